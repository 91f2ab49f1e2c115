//! `fctools`, with its executor that needs no jailer.

use ::fctools::process_spawner::DirectProcessSpawner;
use ::fctools::runtime::tokio::TokioRuntime;
use ::fctools::vm::api::VmApi;
use ::fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use ::fctools::vm::models::*;
use ::fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use ::fctools::vm::{Vm, VmState};
use ::fctools::vmm::arguments::{VmmApiSocket, VmmArguments};
use ::fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use ::fctools::vmm::installation::VmmInstallation;
use ::fctools::vmm::ownership::VmmOwnershipModel;
use ::fctools::vmm::resource::system::ResourceSystem;
use ::fctools::vmm::resource::{CreatedResourceType, MovedResourceType, ResourceType};
use client_tests::Site;
use std::time::Duration;

type Resources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;
type Machine = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;

/// How a machine is configured, and how it ends.
fn drive(init_method: impl FnOnce(&Site) -> InitMethod, scenario: &str, ending: VmShutdownMethod) {
    let site = Site::new();
    let init_method = init_method(&site);
    testnet::in_namespace(false, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(run(&site, init_method, scenario, ending));
        Ok(())
    })
    .unwrap();
}

fn configuration(
    site: &Site,
    resources: &mut Resources,
    scenario: &str,
    by_file: bool,
) -> VmConfigurationData {
    let mut resource = |path, kind| resources.create_resource(path, kind).unwrap();
    let moved = ResourceType::Moved(MovedResourceType::Copied);
    let created = ResourceType::Created(CreatedResourceType::File);
    let mut data = VmConfigurationData {
        boot_source: BootSource {
            kernel_image: resource(site.kernel(), moved),
            boot_args: Some(format!("console=ttyS0 reboot=k pci=off payload={scenario}")),
            initrd: None,
        },
        drives: vec![Drive {
            drive_id: "rootfs".into(),
            is_root_device: true,
            cache_type: Some(DriveCacheType::Writeback),
            partuuid: None,
            is_read_only: Some(false),
            block: Some(resource(site.disk(), moved)),
            rate_limiter: None,
            io_engine: Some(DriveIoEngine::Sync),
            socket: None,
        }],
        machine_configuration: MachineConfiguration {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: None,
            track_dirty_pages: Some(true),
            huge_pages: None,
        },
        cpu_template: None,
        network_interfaces: vec![NetworkInterface {
            iface_id: "eth0".into(),
            host_dev_name: testnet::NAME.into(),
            guest_mac: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }],
        balloon_device: None,
        vsock_device: None,
        logger_system: None,
        metrics_system: None,
        mmds_configuration: Some(MmdsConfiguration {
            version: MmdsVersion::V2,
            network_interfaces: vec!["eth0".into()],
            ipv4_address: None,
        }),
        entropy_device: None,
    };
    // Into a file it writes these under names of its own, which Firecracker passes over.
    if !by_file {
        data.balloon_device = Some(BalloonDevice {
            amount_mib: 4,
            deflate_on_oom: false,
            stats_polling_interval_s: Some(1),
        });
        let uds = resource(site.path("vsock"), ResourceType::Produced);
        data.vsock_device = Some(VsockDevice { guest_cid: 5, uds });
        let logs = Some(resource(site.path("log"), created));
        data.logger_system = Some(LoggerSystem { logs, ..LoggerSystem::default() });
        let metrics = resource(site.path("metrics"), created);
        data.metrics_system = Some(MetricsSystem { metrics });
        data.entropy_device = Some(EntropyDevice::default());
    }
    data
}

async fn run(site: &Site, init_method: InitMethod, scenario: &str, ending: VmShutdownMethod) {
    let mut resources =
        Resources::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
    let by_file = matches!(init_method, InitMethod::ViaJsonConfiguration(_));
    let data = configuration(site, &mut resources, scenario, by_file);
    let socket = VmmApiSocket::Enabled(site.path("api.sock"));
    let mut vm = Machine::prepare(
        UnrestrictedVmmExecutor::new(VmmArguments::new(socket)),
        resources,
        VmmInstallation::new(site.firecracker(), site.path("jailer"), site.path("snapshot-editor")),
        VmConfiguration::New { init_method, data },
    )
    .await
    .unwrap();
    vm.start(Duration::from_secs(10)).await.unwrap();

    assert_eq!(vm.get_state(), VmState::Running);
    let info = vm.get_info().await.unwrap();
    assert!(!info.is_paused);
    assert_eq!(vm.get_firecracker_version().await.unwrap(), "1.12.1");
    assert_eq!(vm.get_machine_configuration().await.unwrap().mem_size_mib, 128);
    if !by_file {
        assert_eq!(vm.get_balloon_device().await.unwrap().amount_mib, 4);
        let every_two = UpdateBalloonStatistics { stats_polling_interval_s: 2 };
        vm.update_balloon_statistics(every_two).await.unwrap();
        assert_eq!(vm.get_balloon_statistics().await.unwrap().target_mib, 4);
    }
    let bucket = TokenBucket { size: 1 << 20, one_time_burst: None, refill_time: 100 };
    let limiter = RateLimiter { bandwidth: bucket.clone(), ops: bucket };
    vm.update_drive(UpdateDrive {
        drive_id: "rootfs".into(),
        block: None,
        rate_limiter: Some(limiter.clone()),
    })
    .await
    .unwrap();
    vm.update_network_interface(UpdateNetworkInterface {
        iface_id: "eth0".into(),
        rx_rate_limiter: Some(limiter),
        tx_rate_limiter: None,
    })
    .await
    .unwrap();
    vm.flush_metrics().await.unwrap();
    vm.create_mmds_untyped(&"{\"a\": 1}".parse().unwrap()).await.unwrap();
    vm.update_mmds_untyped(&"{\"b\": 2}".parse().unwrap()).await.unwrap();
    assert_eq!(vm.get_mmds_untyped().await.unwrap()["b"], 2);
    vm.pause().await.unwrap();
    assert!(vm.get_info().await.unwrap().is_paused);
    vm.resume().await.unwrap();

    let graceful = matches!(ending, VmShutdownMethod::WriteToSerial(_));
    let timeout = Some(Duration::from_secs(10));
    let outcome = vm.shutdown([VmShutdownAction { method: ending, timeout, graceful }]).await;
    let outcome = outcome.unwrap();
    assert!(outcome.errors.is_empty(), "{:?}", outcome.errors);
    assert_eq!(outcome.graceful, graceful);
    vm.cleanup().await.unwrap();
    assert!(!site.path("api.sock").exists());
}

#[test]
fn a_machine_is_made_by_requests_and_ends_by_itself() {
    drive(|_| InitMethod::ViaApiCalls, "echo", VmShutdownMethod::WriteToSerial(b"q".into()));
}

#[test]
fn a_machine_is_made_from_a_file_and_killed() {
    let by_file = |site: &Site| InitMethod::ViaJsonConfiguration(site.path("config.json"));
    drive(by_file, "spin", VmShutdownMethod::PauseThenKill);
}
