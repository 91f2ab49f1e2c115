//! `firecracker-rs-sdk`, from its README's first example on.
//!
//! Its `stop` presses Ctrl, Alt and Del, which the payload does not hear: the end is the one that it
//! gives a machine that it drops, SIGTERM.

use client_tests::Site;
use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::models::*;
use std::fs;
use std::time::{Duration, Instant};

#[test]
fn a_machine_is_started_changed_and_stopped() {
    // Where there is a TAP to be named.
    testnet::in_namespace(false, || {
        run();
        Ok(())
    })
    .unwrap();
}

fn run() {
    let site = Site::new();
    let (log, console) = (site.path("log"), site.path("console"));
    fs::write(&log, "").unwrap();
    let mut instance = FirecrackerOption::new(site.firecracker())
        .api_sock(site.path("api.sock"))
        .id("test-instance")
        .stdout(&console)
        .build()
        .unwrap();
    instance.start_vmm().unwrap();
    assert_eq!(instance.get_firecracker_version().unwrap().firecracker_version, "1.12.1");
    assert_eq!(instance.describe_instance().unwrap().state, instance_info::State::NotStarted);
    instance
        .put_logger(&Logger {
            level: Some(logger::LogLevel::Debug),
            log_path: log.clone(),
            show_level: Some(true),
            show_log_origin: Some(true),
            module: None,
        })
        .unwrap();
    let machine = MachineConfiguration {
        cpu_template: None,
        smt: None,
        mem_size_mib: 128,
        track_dirty_pages: None,
        vcpu_count: 2,
        huge_pages: None,
    };
    instance.put_machine_configuration(&machine).unwrap();
    let seen = instance.get_machine_configuration().unwrap();
    assert_eq!((seen.vcpu_count, seen.mem_size_mib), (2, 128));
    instance
        .put_guest_boot_source(&BootSource {
            boot_args: Some("console=ttyS0 reboot=k panic=1 pci=off payload=spin".into()),
            initrd_path: None,
            kernel_image_path: site.kernel(),
        })
        .unwrap();
    let drive = Drive {
        drive_id: "rootfs".into(),
        partuuid: None,
        is_root_device: true,
        cache_type: Some(CacheType::Unsafe),
        is_read_only: false,
        path_on_host: site.disk(),
        rate_limiter: None,
        io_engine: Some(IoEngine::Sync),
        socket: None,
    };
    instance.put_guest_drive_by_id(&drive).unwrap();
    let missing = Drive { path_on_host: site.path("missing"), ..drive };
    assert!(instance.put_guest_drive_by_id(&missing).is_err());
    instance
        .put_guest_network_interface_by_id(&NetworkInterface {
            guest_mac: Some("06:00:ac:10:00:02".into()),
            host_dev_name: testnet::NAME.into(),
            iface_id: "eth0".into(),
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        })
        .unwrap();
    instance
        .put_balloon(&Balloon {
            amount_mib: 0,
            deflate_on_oom: true,
            stats_polling_interval_s: Some(1),
        })
        .unwrap();
    instance
        .put_mmds_config(&MmdsConfig {
            version: Some(mmds_config::MmdsConfigVersion::V2),
            ipv4_address: None,
            network_interfaces: vec!["eth0".into()],
        })
        .unwrap();
    instance
        .put_guest_vsock(&Vsock { guest_cid: 3, uds_path: site.path("vsock"), vsock_id: None })
        .unwrap();
    instance.put_entropy_device(&EntropyDevice { rate_limiter: None }).unwrap();

    instance.start().unwrap();
    wait_for("hello", || fs::read_to_string(&console).unwrap_or_default().contains("hello"));
    assert_eq!(instance.describe_instance().unwrap().state, instance_info::State::Running);
    assert!(instance.start().is_err());
    instance.pause().unwrap();
    assert_eq!(instance.describe_instance().unwrap().state, instance_info::State::Paused);
    instance.resume().unwrap();
    assert_eq!(instance.describe_balloon_config().unwrap().amount_mib, 0);
    let config = instance.get_export_vm_config().unwrap();
    assert_eq!(config.boot_source.unwrap().kernel_image_path, site.kernel());
    assert_eq!(config.vsock.unwrap().guest_cid, 3);
    instance.stop().unwrap();

    let id = instance.firecracker_pid().unwrap();
    drop(instance);
    let mut status = 0;
    // SAFETY: waits for a child of this process, whose handle is gone; `status` outlives the call.
    wait_for(
        "the end",
        || unsafe { libc::waitpid(id as i32, &raw mut status, libc::WNOHANG) } != 0,
    );
    let ended = libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 143;
    let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGTERM;
    assert!(ended || killed, "{status:#x}");
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}
