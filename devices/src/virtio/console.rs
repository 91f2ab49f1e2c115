//! Virtio console (virtio 1.3 § 5.3): one port, with the size of its window.
//!
//! Output goes to a sink that never blocks. What the sink does not take stays in the guest's
//! buffer, and the worker tries again a little later: a guest that floods its console waits for its
//! reader, and no byte is lost. Input waits in a bounded buffer until the guest has room for it.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use super::Kind;
use super::device::{BATCH, Device, Fault, Message, Payload, Reactor, RestoreError, Worker};
use super::iobuf::IoBuf;
use super::queue::{Chain, Queue, QueueError, QueueState};

const NAME: &str = "virtio-console";
const VERSION: u16 = 1;
const QUEUES: [u16; 2] = [64, 64];
const RX: u16 = 0;
const TX: u16 = 1;

/// VIRTIO_CONSOLE_F_SIZE: the configuration space says how large the window is.
const F_SIZE: u64 = 1 << 0;

/// Input that waits for the guest, in bytes. The machine sends less than this before it hears of
/// [`Reactor::consumed`]; what comes beyond it is dropped.
const INPUT_MAX: usize = 64 * 1024;

/// Bytes that are offered to the sink at once.
const PIECE: usize = 4096;

/// How long a sink that is full is left alone.
const RETRY: Duration = Duration::from_millis(5);

/// Where a console's output goes.
pub trait ConsoleOutput: Send {
    /// Takes some of `bytes`, from the front, and returns how many: 0 if it can take none now.
    /// Must not block.
    fn write(&mut self, bytes: &[u8]) -> usize;
}

/// Makes the sink of a worker. Called once each time the driver starts the device.
pub type OutputFactory = Box<dyn FnMut() -> Box<dyn ConsoleOutput> + Send>;

/// The device.
pub struct Console {
    output: OutputFactory,
    /// Columns and lines of the window; 0 if nothing is known of it.
    size: (u16, u16),
    /// Bytes of the transmit queue's next request that the sink has taken already: a worker that
    /// is stopped in the middle of a request leaves them to the one that goes on.
    delivered: Arc<AtomicU64>,
    // Input that a worker had not passed on when it was stopped.
    returned: mpsc::Receiver<Vec<u8>>,
    give_back: mpsc::Sender<Vec<u8>>,
}

impl Console {
    /// A console whose output goes to what `output` makes. `size` is the window's (columns, lines);
    /// without it the driver is told 0, which it takes for unknown.
    pub fn new(output: OutputFactory, size: Option<(u16, u16)>) -> Console {
        let (give_back, returned) = mpsc::channel();
        let size = size.unwrap_or_default();
        Console { output, size, delivered: Arc::default(), returned, give_back }
    }

    /// The window has `columns` and `rows` now. Returns the new contents of the configuration
    /// space.
    pub fn resize(&mut self, columns: u16, rows: u16) -> Vec<u8> {
        self.size = (columns, rows);
        self.config()
    }
}

impl Device for Console {
    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn features(&self) -> u64 {
        // Without a window as well: the machine may go on in one, or in none after it had one.
        F_SIZE
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> Vec<u8> {
        // § 5.3.4: the fields after these two belong to features that are not offered.
        let (columns, rows) = self.size;
        [columns.to_le_bytes(), rows.to_le_bytes()].concat()
    }

    fn update(&mut self, message: &Message) -> Option<Vec<u8>> {
        match *message {
            Message::Resize { columns, rows } if self.size != (columns, rows) => {
                Some(self.resize(columns, rows))
            }
            _ => None,
        }
    }

    fn worker(&mut self, _group: usize, _negotiated: u64) -> io::Result<Box<dyn Worker>> {
        Ok(Box::new(ConsoleWorker {
            output: (self.output)(),
            rx: None,
            tx: None,
            input: self.returned.try_iter().flatten().take(INPUT_MAX).collect(),
            chain: Chain::default(),
            request: None,
            piece: Box::new([0; PIECE]),
            left: 0..0,
            full: false,
            delivered: Arc::clone(&self.delivered),
            give_back: self.give_back.clone(),
        }))
    }

    fn reset(&mut self) {
        self.delivered.store(0, Ordering::Relaxed);
    }

    fn save(&self) -> Payload {
        // Input that was typed and not read is the host's, and not part of the machine.
        let bytes = self.delivered.load(Ordering::Relaxed).to_le_bytes().to_vec();
        Payload { kind: NAME, version: VERSION, bytes }
    }

    fn restore(&mut self, payload: &Payload) -> Result<(), RestoreError> {
        let bytes = payload.expect(NAME, VERSION)?;
        let bytes = <[u8; 8]>::try_from(bytes)
            .map_err(|_| RestoreError::Invalid { kind: NAME, reason: "it is not 8 bytes long" })?;
        self.delivered.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
        Ok(())
    }
}

/// A transmit request that is being passed on.
struct Request {
    head: u16,
    text: IoBuf,
    /// Bytes of it that the sink took.
    delivered: u64,
}

struct ConsoleWorker {
    output: Box<dyn ConsoleOutput>,
    rx: Option<Queue>,
    tx: Option<Queue>,
    input: VecDeque<u8>,
    chain: Chain,
    request: Option<Request>,
    /// Bytes of the request on their way to the sink: `left` of them are still to be taken.
    piece: Box<[u8; PIECE]>,
    left: std::ops::Range<usize>,
    /// The sink takes nothing until the timer has expired.
    full: bool,
    delivered: Arc<AtomicU64>,
    give_back: mpsc::Sender<Vec<u8>>,
}

impl ConsoleWorker {
    fn transmit(&mut self, reactor: &mut dyn Reactor) {
        let Some(mut queue) = self.tx.take() else { return };
        queue.disable_kicks();
        match self.pass_on(&mut queue) {
            Ok(Next::Idle) => {}
            Ok(Next::Again) => reactor.again(TX),
            Ok(Next::Full) => {
                self.full = true;
                reactor.set_timer(RETRY);
            }
            Err(err) => reactor.fault(Fault::Queue(TX, err)),
        }
        queue.notify();
        self.tx = Some(queue);
    }

    /// Passes up to a batch of pieces to the sink.
    fn pass_on(&mut self, queue: &mut Queue) -> Result<Next, QueueError> {
        for _ in 0..BATCH {
            let Some(request) = &mut self.request else {
                let Some(head) = queue.pop(&mut self.chain)? else {
                    if queue.enable_kicks()? {
                        continue;
                    }
                    return Ok(Next::Idle);
                };
                let mut text = std::mem::take(&mut self.chain.readable);
                // Only the first request after a restart has a part that went out before.
                let delivered = self.delivered.swap(0, Ordering::Relaxed);
                text.advance(delivered);
                self.request = Some(Request { head, text, delivered });
                continue;
            };
            if self.left.is_empty() {
                self.left = 0..request.text.read(self.piece.as_mut_slice());
                if self.left.is_empty() {
                    queue.complete(request.head, 0);
                    self.request = None;
                    continue;
                }
            }
            let taken = self.output.write(&self.piece[self.left.clone()]).min(self.left.len());
            self.left.start += taken;
            request.delivered += taken as u64;
            if !self.left.is_empty() {
                return Ok(Next::Full);
            }
        }
        Ok(Next::Again)
    }

    fn receive(&mut self, reactor: &mut dyn Reactor) {
        let Some(mut queue) = self.rx.take() else { return };
        queue.disable_kicks();
        match self.deliver(&mut queue, reactor) {
            Ok(true) => reactor.again(RX),
            Ok(false) => {}
            Err(fault) => reactor.fault(fault),
        }
        queue.notify();
        self.rx = Some(queue);
    }

    /// Gives the guest input as long as it has buffers. Returns true if more can be given.
    fn deliver(&mut self, queue: &mut Queue, reactor: &mut dyn Reactor) -> Result<bool, Fault> {
        let broken = |err| Fault::Queue(RX, err);
        for _ in 0..BATCH {
            if self.input.is_empty() {
                return Ok(false);
            }
            let Some(head) = queue.pop(&mut self.chain).map_err(broken)? else {
                if queue.enable_kicks().map_err(broken)? {
                    continue;
                }
                return Ok(false);
            };
            let written = self.chain.writable.write(self.input.make_contiguous());
            self.input.drain(..written);
            reactor.consumed(written);
            queue.complete(head, written as u32);
            if written == 0 {
                return Err(Fault::Request(RX, "a receive buffer cannot be written to"));
            }
        }
        Ok(!self.input.is_empty())
    }
}

/// How passing on output ended.
enum Next {
    /// Everything is passed on.
    Idle,
    /// A batch is done, and there may be more.
    Again,
    /// The sink is full.
    Full,
}

impl Worker for ConsoleWorker {
    fn start_queue(&mut self, index: u16, queue: Queue, _reactor: &mut dyn Reactor) {
        match index {
            RX => self.rx = Some(queue),
            _ => self.tx = Some(queue),
        }
    }

    fn stop_queue(&mut self, index: u16, _reactor: &mut dyn Reactor) -> Option<QueueState> {
        let queue = match index {
            RX => {
                if !self.input.is_empty() {
                    // Fails only if the device is gone, and then nobody goes on.
                    let _ = self.give_back.send(std::mem::take(&mut self.input).into());
                }
                self.rx.take()
            }
            TX => self.tx.take().map(|mut queue| {
                if let Some(request) = self.request.take() {
                    queue.undo(&[request.head]);
                    self.delivered.store(request.delivered, Ordering::Relaxed);
                    self.left = 0..0;
                }
                queue
            }),
            _ => None,
        };
        Some(queue.map(|queue| queue.state()).unwrap_or_default())
    }

    fn on_kick(&mut self, index: u16, reactor: &mut dyn Reactor) {
        match index {
            RX => self.receive(reactor),
            _ if self.full => {}
            _ => self.transmit(reactor),
        }
    }

    fn on_timer(&mut self, reactor: &mut dyn Reactor) {
        self.full = false;
        self.transmit(reactor);
    }

    fn on_message(&mut self, message: Message, reactor: &mut dyn Reactor) {
        // A new size reaches the driver through the configuration space.
        if let Message::Input(bytes) = message {
            let room = INPUT_MAX - self.input.len().min(INPUT_MAX);
            self.input.extend(&bytes[..room.min(bytes.len())]);
            self.receive(reactor);
        }
    }
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
