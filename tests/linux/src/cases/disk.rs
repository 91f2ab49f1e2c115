//! virtio-blk under a stock driver and file system.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use tempfile::NamedTempFile;

use super::{Case, check};
use crate::guest::{BOOT, Failure, Machine, READY};
use crate::site::Site;

pub const CASES: &[(&str, Case)] = &[
    ("disk::root_and_second", root_and_second),
    ("disk::read_only", read_only),
    ("disk::flush_reaches_the_file", flush_reaches_the_file),
    ("disk::discard", discard),
    ("disk::queues", queues),
    ("disk::direct", direct),
    ("disk::survives_a_kill", survives_a_kill),
];

const MIB: u64 = 1 << 20;

/// A copy of the root disk that the test may write to.
pub fn root_disk(site: &Site) -> Result<NamedTempFile, Failure> {
    let image = NamedTempFile::new()?;
    fs::copy(site.file("root.ext4"), image.path())?;
    Ok(image)
}

/// A sparse disk without content.
pub fn blank_disk(mib: u64) -> Result<NamedTempFile, Failure> {
    let image = NamedTempFile::new()?;
    image.as_file().set_len(mib * MIB)?;
    Ok(image)
}

/// The guest runs from vda; vdb has its size and id, takes a file system and keeps a file.
fn root_and_second(site: &Site) -> Result<(), Failure> {
    let root = root_disk(site)?;
    let data = blank_disk(48)?;
    let mut guest =
        Machine::new(site)?.disk(root.path(), ",root").disk(data.path(), ",id=data-disk").boot()?;
    guest.expect("awk '$2 == \"/\" { print $1, $3 }' /proc/mounts | tail -n 1", "/dev/vda ext4")?;
    guest.expect("cat /sys/block/vdb/size", &(48 * MIB / 512).to_string())?;
    guest.expect("cat /sys/block/vdb/serial", "data-disk")?;
    guest.run("mke2fs /dev/vdb >/dev/null && mount -t ext4 /dev/vdb /mnt")?;
    guest.run("dd if=/dev/urandom of=/mnt/file bs=1M count=8 2>/dev/null && cp /mnt/file /tmp")?;
    guest.run("umount /mnt && echo 3 >/proc/sys/vm/drop_caches")?;
    guest.run("mount -t ext4 /dev/vdb /mnt")?;
    guest.run("[ \"$(md5sum </mnt/file)\" = \"$(md5sum </tmp/file)\" ]")?;
    guest.run("umount /mnt; echo kept >/root/note")?;
    guest.power_off()?;

    // What was written is there for the next machine.
    let mut guest = Machine::new(site)?.disk(root.path(), ",root").boot()?;
    guest.expect("cat /root/note", "kept")?;
    guest.power_off()
}

fn read_only(site: &Site) -> Result<(), Failure> {
    let image = root_disk(site)?;
    let before = fs::read(image.path())?;
    let mut guest = Machine::new(site)?.disk(image.path(), ",ro").boot()?;
    guest.expect("cat /sys/block/vda/ro", "1")?;
    guest.run("mount -t ext4 -o ro /dev/vda /mnt && [ -x /mnt/sbin/init ] && umount /mnt")?;
    // The driver knows and refuses; lifting its own flag must not help, the device refuses too.
    let write = "dd if=/dev/urandom of=/dev/vda bs=4096 count=4 conv=fsync 2>/dev/null";
    let (status, _) = guest.attempt(write)?;
    check(status != 0, || guest.failure("a write to a read-only disk succeeded").to_string())?;
    guest.power_off()?;
    check(fs::read(image.path())? == before, || "the image of a read-only disk changed".into())
}

/// What a guest has synced is in the image while the guest still runs.
fn flush_reaches_the_file(site: &Site) -> Result<(), Failure> {
    let image = blank_disk(16)?;
    let mut guest = Machine::new(site)?.disk(image.path(), "").boot()?;
    guest.expect("cat /sys/block/vda/queue/write_cache", "write back")?;
    let at = 3 * MIB;
    guest.run("yes hull | head -c 65536 >/tmp/pattern")?;
    guest.run("dd if=/tmp/pattern of=/dev/vda bs=65536 seek=48 conv=fsync 2>/dev/null")?;
    let mut file = File::open(image.path())?;
    file.seek(SeekFrom::Start(at))?;
    let mut found = vec![0; 65536];
    file.read_exact(&mut found)?;
    let held = found.chunks(5).all(|chunk| *chunk == b"hull\n"[..chunk.len()]);
    check(held, || "synced data is not in the image".into())?;
    // Field 16 of the statistics counts completed flushes.
    let flushes = guest.run("awk '{ print $16 }' /sys/block/vda/stat")?;
    check(flushes.parse::<u32>().is_ok_and(|count| count > 0), || {
        guest.failure("no flush was completed").to_string()
    })?;
    guest.power_off()
}

/// Discarded and zeroed ranges give their blocks back and read as zeroes.
fn discard(site: &Site) -> Result<(), Failure> {
    let image = blank_disk(32)?;
    let mut guest = Machine::new(site)?.disk(image.path(), "").boot()?;
    guest.run("[ -b /dev/vda ]")?;
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=32 conv=fsync 2>/dev/null")?;
    let full = fs::metadata(image.path())?.blocks();
    check(full * 512 >= 32 * MIB, || format!("only {full} blocks were written"))?;
    guest.run("blkdiscard -o 8388608 -l 16777216 /dev/vda")?;
    let left = fs::metadata(image.path())?.blocks();
    check(left * 512 <= 17 * MIB, || format!("{left} blocks of {full} left after a discard"))?;
    let zeroes = "dd if=/dev/vda bs=1M skip=8 count=16 2>/dev/null | tr -d '\\0' | wc -c";
    guest.expect(zeroes, "0")?;
    let rest = "dd if=/dev/vda bs=1M count=8 2>/dev/null | tr -d '\\0' | wc -c";
    let kept: u64 = guest.run(rest)?.parse()?;
    check(kept > 7 * MIB, || format!("a discard took its neighbours: {kept} bytes left"))?;
    guest.power_off()
}

/// Two queues with two vCPUs writing at once.
fn queues(site: &Site) -> Result<(), Failure> {
    let image = blank_disk(32)?;
    let mut guest =
        Machine::new(site)?.option("--cpus", "2").disk(image.path(), ",queues=2").boot()?;
    guest.expect("ls /sys/block/vda/mq | wc -l", "2")?;
    guest.run("dd if=/dev/urandom of=/tmp/a bs=1M count=8 2>/dev/null; cp /tmp/a /tmp/b")?;
    let write = |cpu: u32, name: char, seek: u32| {
        format!(
            "taskset {cpu} dd if=/tmp/{name} of=/dev/vda bs=1M seek={seek} conv=fsync 2>/dev/null"
        )
    };
    guest.run(&format!("{} & {} & wait", write(1, 'a', 0), write(2, 'b', 16)))?;
    guest.run("echo 3 >/proc/sys/vm/drop_caches")?;
    for (name, skip) in [('a', 0), ('b', 16)] {
        let read =
            format!("dd if=/dev/vda bs=1M skip={skip} count=8 2>/dev/null | cmp - /tmp/{name}");
        guest.run(&read)?;
    }
    guest.power_off()
}

/// The page cache of the host stays out of it where the file system allows.
fn direct(site: &Site) -> Result<(), Failure> {
    // Not in a tmpfs, which has no O_DIRECT before Linux 6.6.
    let image = blank_disk(16)?;
    let mut guest = Machine::new(site)?.disk(image.path(), ",direct").boot()?;
    guest.run("[ -b /dev/vda ]")?;
    guest.run("dd if=/dev/urandom of=/tmp/a bs=1M count=8 2>/dev/null")?;
    guest.run("dd if=/tmp/a of=/dev/vda bs=64k conv=fsync 2>/dev/null")?;
    guest.run("echo 3 >/proc/sys/vm/drop_caches")?;
    guest.run("dd if=/dev/vda bs=4k count=2048 2>/dev/null | cmp - /tmp/a")?;
    guest.power_off()
}

/// Hull is killed while the guest writes: the file system is whole, and what was synced is there.
fn survives_a_kill(site: &Site) -> Result<(), Failure> {
    let image = root_disk(site)?;
    let mut guest = Machine::new(site)?.disk(image.path(), ",root").boot()?;
    guest.run("echo before >/root/synced && sync")?;
    guest.send("n=0; while cp /bin/busybox /root/f$((n % 8)); do n=$((n + 1)); [ $((n % 20)) -ne 0 ] || { sync; echo round; }; done\n")?;
    guest.wait_for("round", BOOT)?;
    guest.kill()?;

    // The first run replays the journal, as a boot would; the second has nothing left to mend.
    let check_disk = |arguments: &[&str]| {
        Command::new(site.file("e2fsck")).args(arguments).arg(image.path()).output()
    };
    let replay = check_disk(&["-p"])?;
    check(matches!(replay.status.code(), Some(0 | 1)), || format!("e2fsck -p: {replay:?}"))?;
    let clean = check_disk(&["-f", "-n"])?;
    check(clean.status.success(), || format!("e2fsck -fn: {clean:?}"))?;

    let mut guest = Machine::new(site)?.disk(image.path(), ",root").start("script")?;
    guest.wait_for(READY, BOOT)?;
    guest.expect("cat /root/synced", "before")?;
    guest.power_off()
}
