//! The ways into a kernel: file formats, boot protocols, kernels with and without built-in drivers.

use super::{Case, check};
use crate::guest::{BOOT, Failure, Machine};
use crate::site::Site;

pub const CASES: &[(&str, Case)] = &[
    ("boot::vmlinuz", vmlinuz),
    ("boot::vmlinux", vmlinux),
    ("boot::pvh", pvh),
    ("boot::bzimage_entry", bzimage_entry),
    ("boot::generic_kernel", generic_kernel),
    ("boot::self_check", self_check),
];

/// Boots, looks at the command line the kernel saw, powers off.
fn boots(machine: Machine) -> Result<(), Failure> {
    let mut guest = machine.cmdline("marker=seen").boot()?;
    guest.run("grep -q marker=seen /proc/cmdline")?;
    guest.power_off()
}

/// The distribution's bzImage (LZ4 inside), unpacked on the host.
fn vmlinuz(site: &Site) -> Result<(), Failure> {
    boots(Machine::new(site)?)
}

fn vmlinux(site: &Site) -> Result<(), Failure> {
    boots(Machine::with_kernel(site, "cloud.vmlinux", "cloud.initramfs")?)
}

fn pvh(site: &Site) -> Result<(), Failure> {
    let machine = Machine::with_kernel(site, "cloud.vmlinux", "cloud.initramfs")?;
    boots(machine.option("--boot", "pvh"))
}

/// The bzImage's own 64-bit entry: the guest unpacks itself.
fn bzimage_entry(site: &Site) -> Result<(), Failure> {
    boots(Machine::new(site)?.option("--boot", "bzimage"))
}

/// Debian's generic kernel: XZ with the x86 filter, ext4 and virtio as modules.
fn generic_kernel(site: &Site) -> Result<(), Failure> {
    let machine = Machine::with_kernel(site, "generic.vmlinuz", "generic.initramfs")?;
    boots(machine.memory("512M"))
}

/// What `make run` shows where nobody is at a terminal, with its timings.
fn self_check(site: &Site) -> Result<(), Failure> {
    let image = super::disk::root_disk(site)?;
    let network = site.network();
    let mut guest = Machine::new(site)?
        .option("--cpus", "2")
        .disk(image.path(), ",root")
        .option("--net", network.option(""))
        .flag("--rng")
        .flag("--timings")
        .cmdline(network.cmdline())
        .cmdline("hull.cpus=2 hull.memory=256 hull.disk=vda hull.rng")
        .start("check")?;
    let verdict = guest.wait_for("hull-check: ", BOOT);
    let said = verdict.and_then(|_| guest.wait_for("\n", BOOT))?;
    check(said == "PASS", || guest.failure("the self-check failed").to_string())?;
    guest.wait_success()?;
    let timings = guest.stderr();
    check(timings.contains("userspace reached"), || {
        guest.failure("the timings do not say when userspace was reached").to_string()
    })
}
