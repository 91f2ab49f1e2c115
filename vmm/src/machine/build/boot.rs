//! What a machine that boots has in its memory beside the kernel: tables, and a command line.

use std::io;

use arch::acpi::{self, AcpiConfig};
use arch::boot::cpu_state;
use arch::cpuid::Cpuid;
use arch::layout::VirtioSlot;
use arch::mptable;

use super::super::slot::Slot;
use super::{BuildError, host};
use crate::config::{ConsoleDevice, ConsoleMode, VmConfig};
use crate::hypervisor::{HypervisorError, Vcpu};
use crate::memory::GuestRam;

/// True if it has a serial port.
pub(super) fn has_serial(config: &VmConfig) -> bool {
    config.console.device == ConsoleDevice::Serial && config.console.mode != ConsoleMode::Off
}
/// Puts the boot vCPU at the kernel's entry. The others wait for their start-up interrupt.
pub(super) fn enter_at(vcpu: &dyn Vcpu, entry: &arch::boot::Entry) -> Result<(), HypervisorError> {
    vcpu.set_fpu(&cpu_state::fpu())?;
    vcpu.set_sregs(&cpu_state::sregs(entry, vcpu.sregs()?))?;
    vcpu.set_regs(&cpu_state::regs(entry))?;
    vcpu.set_lapic(&cpu_state::with_local_lines(vcpu.lapic()?))
}

/// Writes ACPI and MP tables. Returns the address of the RSDP.
pub(super) fn describe(
    config: &VmConfig,
    slots: &[Slot],
    ram: &mut GuestRam,
    cpuid: &Cpuid,
) -> Result<u64, BuildError> {
    let cpus = config.cpus as u8;
    let tables = acpi::build(&AcpiConfig {
        cpus,
        virtio: (0..slots.len()).filter_map(VirtioSlot::new).collect(),
        serial: has_serial(config),
        i8042: config.i8042,
        vmgenid: true,
        vmclock: true,
    })?;
    tables.write(ram.memory().guest().as_ref())?;
    let (signature, features) = cpuid.signature_and_features();
    mptable::write(ram.memory().guest().as_ref(), cpus, signature, features)
        .map_err(|err| host("memory for the MP table")(io::Error::other(err)))?;
    Ok(tables.rsdp())
}

/// The kernel command line: what saves a guest time at boot, where its console, disks and devices
/// are, and what the user adds (or all that the user wants, with `replace-cmdline`). Devices come
/// first, so that a user's `--` stays the end of the kernel's own arguments.
pub(super) fn command_line(config: &VmConfig, virtio_devices: usize) -> String {
    let mut words: Vec<String> = Vec::new();
    if !config.kernel.replace_cmdline {
        match (config.console.mode, config.console.device) {
            (ConsoleMode::Off, _) => {}
            (_, ConsoleDevice::Serial) => words.push("console=ttyS0".into()),
            (_, ConsoleDevice::Virtio) => words.push("console=hvc0".into()),
        }
        words.extend(DEFAULT_CMDLINE.split_whitespace().map(str::to_owned));
        if !config.i8042 {
            // ACPI says that there is none, and Linux probes the ports all the same.
            words.extend(["i8042.noaux".into(), "i8042.nokbd".into()]);
        }
        words.extend(root_arguments(config));
    }
    words.extend((0..virtio_devices).filter_map(VirtioSlot::new).map(|slot| slot.cmdline_option()));
    words.extend(config.kernel.cmdline.clone());
    words.join(" ")
}

/// The words of a kernel command line that say where the root file system is, if a disk has it.
pub fn root_arguments(config: &VmConfig) -> Option<String> {
    let (n, disk) = config.disk.iter().enumerate().find(|(_, disk)| disk.root)?;
    let place = match &disk.partuuid {
        Some(id) => format!("PARTUUID={id}"),
        None => format!("/dev/{}", disk_node(n)),
    };
    Some(format!("root={place} {}", if disk.ro { "ro" } else { "rw" }))
}

/// Words of the default command line beside console and root:
/// - `quiet`: each character on a serial console is an exit;
/// - `reboot=k`: reset at once through port 0x64 instead of trying other ways first;
/// - `panic=-1`: a kernel that panics resets at once, so that the machine ends;
/// - `pci=off`, `8250.nr_uarts=1`: no probing of hardware that is not there;
/// - `random.trust_cpu=on`: a guest without RDRAND trust waits for entropy.
const DEFAULT_CMDLINE: &str = "quiet reboot=k panic=-1 pci=off 8250.nr_uarts=1 random.trust_cpu=on";

/// Name of the `n`th virtio disk in a Linux guest.
fn disk_node(n: usize) -> String {
    // 26 disks are more than a machine has.
    format!("vd{}", char::from(b'a' + (n % 26) as u8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DiskConfig;

    #[test]
    fn the_command_line_is_default_extended_or_replaced() {
        let mut config = VmConfig::default();
        let no_i8042 = "i8042.noaux i8042.nokbd";
        assert_eq!(command_line(&config, 0), format!("console=ttyS0 {DEFAULT_CMDLINE} {no_i8042}"));
        config.kernel.cmdline = Some("single -- arg".into());
        config.disk = vec![DiskConfig::default(), DiskConfig { root: true, ..Default::default() }];
        let line = command_line(&config, 2);
        assert!(line.contains(" root=/dev/vdb rw virtio_mmio.device="), "{line}");
        assert!(line.ends_with(" single -- arg"), "{line}");
        assert_eq!(line.matches("virtio_mmio.device=").count(), 2);
        config.kernel.replace_cmdline = true;
        assert_eq!(command_line(&config, 0), "single -- arg");
    }
}
