//! What can be done to a machine that runs.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use vmm::config::{
    BalloonConfig, ByteSize, DiskConfig, DiskFormat, NetConfig, RateLimit, VmConfig,
};
use vmm::devices::virtio::blk::{Candidate, DiskError};
use vmm::machine::{
    BackEnd, Command, DeviceStatus, Handle, Message, State, Traffic, certainly_raw, open_image,
};

use super::{Instance, elsewhere, send};
use crate::fault::{DONE, Done, Fault, chain};
use crate::types::balloon::{BalloonStats, BalloonStatsUpdate, BalloonUpdate};
use crate::types::drive::PartialDrive;
use crate::types::net::PartialNetworkInterface;
use crate::types::rate::RateLimiter;

/// How long a change of state that is under way is waited for before another one, and how often it is
/// looked at.
const CHANGING: Duration = Duration::from_millis(200);
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Name of the balloon among a machine's devices.
const BALLOON: &str = "balloon";

/// There is no balloon.
pub fn no_balloon() -> Fault {
    Fault::bad("Balloon config error: No balloon device found.")
}

impl Instance {
    /// Halts the machine, or lets it go on. What it does already is done.
    ///
    /// # Errors
    /// It was not started, or is about to change its state.
    pub async fn set_paused(&self, paused: bool) -> Done {
        let handle = self.handle()?;
        let done = if paused { State::Paused } else { State::Running };
        let end = Instant::now() + CHANGING;
        loop {
            if send(&handle, Command::Status).await? == done {
                return Ok(DONE);
            }
            let command = if paused { Command::Pause } else { Command::Resume };
            match send(&handle, command).await {
                Ok(_) => return Ok(DONE),
                // Another client wants the same, or the machine is about to change otherwise.
                Err(_) if Instant::now() < end => tokio::time::sleep(LOOK_AGAIN).await,
                Err(fault) => return Err(fault),
            }
        }
    }

    /// The running machine and its balloon.
    fn balloon(&self) -> Result<(Handle, BalloonConfig), Fault> {
        let handle = self.handle()?;
        Ok((handle, self.config().balloon.ok_or_else(no_balloon)?))
    }

    /// Gives the balloon of the running machine another size.
    ///
    /// # Errors
    /// The machine does not run, has no balloon, or has less memory than that.
    pub async fn patch_balloon(&self, update: BalloonUpdate) -> Done {
        let (handle, mut balloon) = self.balloon()?;
        balloon.size = ByteSize(u64::from(update.amount_mib) << 20);
        let mut config = self.config();
        config.balloon = Some(balloon.clone());
        config.validate_without_kernel().map_err(|error| Fault::of_config(&error))?;
        let message = Message::BalloonTarget(balloon.pages());
        send(&handle, Command::Update { device: BALLOON.into(), message }).await?;
        self.lock().config.balloon = Some(balloon);
        Ok(DONE)
    }

    /// Asks the guest about its memory more or less often.
    ///
    /// # Errors
    /// The machine does not run or has no balloon; statistics were not asked for before the start,
    /// or would not be any more.
    pub async fn patch_balloon_statistics(&self, update: BalloonStatsUpdate) -> Done {
        let (handle, mut balloon) = self.balloon()?;
        let seconds = update.stats_polling_interval_s;
        if (seconds == 0) != (balloon.stats_interval == 0) {
            return Err(Fault::bad(
                "stats_polling_interval_s: Statistics cannot be enabled/disabled after activation.",
            ));
        }
        let message = Message::StatisticsInterval(Duration::from_secs(seconds.into()));
        send(&handle, Command::Update { device: BALLOON.into(), message }).await?;
        balloon.stats_interval = seconds;
        self.lock().config.balloon = Some(balloon);
        Ok(DONE)
    }

    /// How the balloon of the running machine stands.
    ///
    /// # Errors
    /// The machine does not run or has no balloon; statistics were not asked for before the start.
    pub async fn balloon_statistics(&self) -> Result<BalloonStats, Fault> {
        let (handle, balloon) = self.balloon()?;
        if balloon.stats_interval == 0 {
            return Err(Fault::bad(
                "Statistics are disabled: stats_polling_interval_s was 0 before the start.",
            ));
        }
        let (answer, status) = mpsc::sync_channel(1);
        send(&handle, Command::DeviceStatus { device: BALLOON.into(), answer }).await?;
        match status.try_recv() {
            Ok(DeviceStatus::Balloon(status)) => Ok(status.into()),
            Err(_) => Err(Fault::gone()),
        }
    }

    /// Gives a drive of the running machine another file or other limits.
    ///
    /// # Errors
    /// The machine does not run; it has no such drive; the file cannot be a disk, or what is in
    /// flight on the old one does not end.
    pub async fn patch_drive(&self, update: PartialDrive) -> Done {
        let handle = self.handle()?;
        let id = update.drive_id;
        let place = find(&self.config().disk, |disk| &disk.id, "drive", &id)?;
        if update.path_on_host.is_none() && update.rate_limiter.is_none() {
            return Err(Fault::bad("path_on_host or rate_limiter: one of them has to be there."));
        }
        if let Some(path) = update.path_on_host {
            let mut config = self.config().disk[place].clone();
            if let Some(overlay) = &config.overlay {
                let overlay = overlay.display();
                return Err(Fault::bad(format!(
                    "path_on_host: the drive has the overlay {overlay}, which stands on the file that it has."
                )));
            }
            config.set_file(&path);
            // On a thread of its own: a file system that hangs shall hang nobody else.
            let opened = elsewhere(move || another(&config)).await?;
            let back_end =
                opened.map_err(|error| Fault::bad(format!("path_on_host: {}", chain(&error))))?;
            send(&handle, Command::Replace { device: id.clone(), back_end }).await?;
            self.lock().config.disk[place].set_file(&path);
        }
        if let Some(limiter) = update.rate_limiter {
            let traffic = Traffic::All;
            self.limit(&handle, &id, traffic, limiter, |config| &mut config.disk[place].rate)
                .await?;
        }
        Ok(DONE)
    }

    /// Gives a network card of the running machine other limits.
    ///
    /// # Errors
    /// The machine does not run; it has no such card.
    pub async fn patch_net(&self, update: PartialNetworkInterface) -> Done {
        let handle = self.handle()?;
        let id = update.iface_id;
        let place = find(&self.config().net, |net: &NetConfig| &net.id, "network interface", &id)?;
        if let Some(limiter) = update.rx_rate_limiter {
            let traffic = Traffic::Received;
            self.limit(&handle, &id, traffic, limiter, |config| &mut config.net[place].rx_rate)
                .await?;
        }
        if let Some(limiter) = update.tx_rate_limiter {
            let traffic = Traffic::Sent;
            self.limit(&handle, &id, traffic, limiter, |config| &mut config.net[place].tx_rate)
                .await?;
        }
        Ok(DONE)
    }

    /// Changes a limit of a device, and notes it where `place` says. What `limiter` does not name
    /// stays as it is.
    async fn limit(
        &self,
        handle: &Handle,
        device: &str,
        traffic: Traffic,
        limiter: RateLimiter,
        place: impl Fn(&mut VmConfig) -> &mut Option<RateLimit>,
    ) -> Result<(), Fault> {
        let reply = {
            // Noted and sent under one lock: of two changes at once, both come out in one order.
            let mut inner = self.lock();
            let noted = place(&mut inner.config);
            let limit = noted.unwrap_or_default().updated(limiter.into());
            *noted = Some(limit);
            let message = Message::RateLimit(traffic, limit.limiter());
            send(handle, Command::Update { device: device.to_owned(), message })
        };
        reply.await.map(drop)
    }
}

/// Index of the device called `id`. A machine that was started keeps its devices.
fn find<T>(
    devices: &[T],
    name: impl Fn(&T) -> &Option<String>,
    what: &str,
    id: &str,
) -> Result<usize, Fault> {
    let place = devices.iter().position(|device| name(device).as_deref() == Some(id));
    place.ok_or_else(|| Fault::bad(format!("There is no {what} with the id {id}.")))
}

/// Opens what a drive is to have from now on.
fn another(config: &DiskConfig) -> Result<BackEnd, DiskError> {
    if config.format == Some(DiskFormat::Qcow2) {
        return open_image(config, &config.path).map(Box::new).map(BackEnd::Image);
    }
    let candidate = Candidate::open(&config.path, config.ro, config.direct)?;
    certainly_raw(config)?;
    Ok(BackEnd::Disk(candidate))
}
