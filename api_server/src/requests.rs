//! How many requests came for what, and how many were refused: Firecracker's groups, with more in them.

use std::sync::Arc;

use axum::http::Method;
use vmm::devices::metrics;
use vmm::metrics::{Counter, Registry};

metrics! {
    /// Requests for something.
    pub struct GetRequests {
        /// For what runs here.
        instance_info_count: Counter,
        /// For CPUs and memory.
        machine_cfg_count: Counter,
        /// For the metadata.
        mmds_count: Counter,
        /// For the version.
        vmm_version_count: Counter,
        /// For metrics.
        metrics_count: Counter,
        /// For events.
        events_count: Counter,
        /// For anything else.
        other_count: Counter,
        /// That were refused.
        fails_count: Counter,
    }
}

metrics! {
    /// Requests that put something.
    pub struct PutRequests {
        /// Actions.
        actions_count: Counter,
        /// Actions that were refused.
        actions_fails: Counter,
        /// What is booted.
        boot_source_count: Counter,
        /// What is booted, refused.
        boot_source_fails: Counter,
        /// Disks.
        drive_count: Counter,
        /// Disks that were refused.
        drive_fails: Counter,
        /// The log.
        logger_count: Counter,
        /// The log, refused.
        logger_fails: Counter,
        /// CPUs and memory.
        machine_cfg_count: Counter,
        /// CPUs and memory, refused.
        machine_cfg_fails: Counter,
        /// What CPUs are like.
        cpu_cfg_count: Counter,
        /// What CPUs are like, refused.
        cpu_cfg_fails: Counter,
        /// Where metrics are written.
        metrics_count: Counter,
        /// Where metrics are written, refused.
        metrics_fails: Counter,
        /// Network cards.
        network_count: Counter,
        /// Network cards that were refused.
        network_fails: Counter,
        /// Metadata.
        mmds_count: Counter,
        /// Metadata that was refused.
        mmds_fails: Counter,
        /// Socket devices.
        vsock_count: Counter,
        /// Socket devices that were refused.
        vsock_fails: Counter,
        /// Anything else.
        other_count: Counter,
        /// Anything else, refused.
        other_fails: Counter,
    }
}

metrics! {
    /// Requests that change something.
    pub struct PatchRequests {
        /// Disks.
        drive_count: Counter,
        /// Disks, refused.
        drive_fails: Counter,
        /// Network cards.
        network_count: Counter,
        /// Network cards, refused.
        network_fails: Counter,
        /// CPUs and memory.
        machine_cfg_count: Counter,
        /// CPUs and memory, refused.
        machine_cfg_fails: Counter,
        /// Metadata.
        mmds_count: Counter,
        /// Metadata, refused.
        mmds_fails: Counter,
        /// Anything else, such as pausing.
        other_count: Counter,
        /// Anything else, refused.
        other_fails: Counter,
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Requests {
    get: Arc<GetRequests>,
    put: Arc<PutRequests>,
    patch: Arc<PatchRequests>,
}

impl Requests {
    /// Counters that are seen in `registry`.
    pub(crate) fn new(registry: &Registry) -> Requests {
        let requests = Requests::default();
        registry.add(("get_api_requests", Arc::clone(&requests.get) as _));
        registry.add(("put_api_requests", Arc::clone(&requests.put) as _));
        registry.add(("patch_api_requests", Arc::clone(&requests.patch) as _));
        requests
    }

    /// Counts a request that was answered. The API's thread alone does.
    pub(crate) fn count(&self, method: &Method, path: &str, refused: bool) {
        let resource = path.split('/').find(|segment| !segment.is_empty()).unwrap_or_default();
        let Requests { get, put, patch } = self;
        let (count, fails) = match (method.as_str(), resource) {
            ("GET", resource) => {
                let count = match resource {
                    "" => &get.instance_info_count,
                    "machine-config" => &get.machine_cfg_count,
                    "mmds" => &get.mmds_count,
                    "version" => &get.vmm_version_count,
                    "metrics" => &get.metrics_count,
                    "events" => &get.events_count,
                    _ => &get.other_count,
                };
                (count, &get.fails_count)
            }
            ("PUT", "actions") => (&put.actions_count, &put.actions_fails),
            ("PUT", "boot-source") => (&put.boot_source_count, &put.boot_source_fails),
            ("PUT", "drives") => (&put.drive_count, &put.drive_fails),
            ("PUT", "logger") => (&put.logger_count, &put.logger_fails),
            ("PUT", "machine-config") => (&put.machine_cfg_count, &put.machine_cfg_fails),
            ("PUT", "cpu-config") => (&put.cpu_cfg_count, &put.cpu_cfg_fails),
            ("PUT", "metrics") => (&put.metrics_count, &put.metrics_fails),
            ("PUT", "network-interfaces") => (&put.network_count, &put.network_fails),
            ("PUT", "mmds") => (&put.mmds_count, &put.mmds_fails),
            ("PUT", "vsock") => (&put.vsock_count, &put.vsock_fails),
            ("PUT", _) => (&put.other_count, &put.other_fails),
            ("PATCH", "drives") => (&patch.drive_count, &patch.drive_fails),
            ("PATCH", "network-interfaces") => (&patch.network_count, &patch.network_fails),
            ("PATCH", "machine-config") => (&patch.machine_cfg_count, &patch.machine_cfg_fails),
            ("PATCH", "mmds") => (&patch.mmds_count, &patch.mmds_fails),
            ("PATCH", _) => (&patch.other_count, &patch.other_fails),
            _ => return,
        };
        count.count();
        if refused {
            fails.count();
        }
    }
}
