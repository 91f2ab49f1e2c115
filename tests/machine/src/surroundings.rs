//! A host that lacks something: what one Hull sees of devices, modules, users and limits, changed
//! between fork and exec, in a mount namespace of its own. Takes root.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::ptr;

/// A user who owns nothing.
pub const NOBODY: libc::uid_t = 65534;

/// What is changed, in this order.
#[derive(Debug)]
enum Step {
    /// A file system in memory over a directory.
    Empty(CString),
    /// One with room for 4 MiB.
    Small(CString),
    Folder(CString),
    Node(CString, libc::mode_t, libc::gid_t, libc::dev_t),
    /// No device in `/dev` can be opened, whoever asks.
    NoDevices,
    /// A directory as it is, but nothing in it can be written.
    ReadOnly(CString),
    Limit(libc::__rlimit_resource_t, u64),
    User(libc::uid_t),
}

/// A host for one Hull, made from this one.
#[derive(Debug, Default)]
pub struct Surroundings {
    steps: Vec<Step>,
    namespace: bool,
    user: Option<libc::uid_t>,
}

fn text(path: &Path) -> CString {
    match CString::new(path.as_os_str().as_bytes()) {
        Ok(text) => text,
        Err(error) => panic!("{}: {error}", path.display()),
    }
}

impl Surroundings {
    /// This host as it is.
    pub fn new() -> Surroundings {
        Surroundings::default()
    }

    /// A `/dev` with the devices that every host has, and no other.
    pub fn bare_devices(self) -> Surroundings {
        let bare = self.step(Step::Empty(c"/dev".into()));
        ["null", "zero", "full", "random", "urandom"]
            .iter()
            .fold(bare, |host, name| host.device(&format!("/dev/{name}"), 0o666))
    }

    /// A device of this host under the same name, with access rights of the caller's choice. To be
    /// called after [`Surroundings::bare_devices`].
    pub fn device(self, path: &str, mode: libc::mode_t) -> Surroundings {
        self.device_of_group(path, mode, 0)
    }

    /// As [`Surroundings::device`], of a group that is not root's.
    pub fn device_of_group(
        self,
        path: &str,
        mode: libc::mode_t,
        group: libc::gid_t,
    ) -> Surroundings {
        let path = Path::new(path);
        let number = match fs::metadata(path) {
            Ok(data) if data.file_type().is_char_device() => data.rdev(),
            other => panic!("{} is no device: {other:?}", path.display()),
        };
        let folder = path.parent().filter(|folder| *folder != Path::new("/dev"));
        let host = match folder {
            Some(folder) => self.step(Step::Folder(text(folder))),
            None => self,
        };
        host.step(Step::Node(text(path), mode, group, number))
    }

    /// Takes the use of all devices away, from root too, as a container does. To be called after
    /// those that make them.
    pub fn devices_of_no_use(self) -> Surroundings {
        self.step(Step::NoDevices)
    }

    /// A host whose only kernel modules are these.
    pub fn modules(self, names: &[&str]) -> Surroundings {
        let none = self.step(Step::Empty(c"/sys/module".into()));
        names.iter().fold(none, |host, name| {
            host.step(Step::Folder(text(&Path::new("/sys/module").join(name))))
        })
    }

    /// An empty directory with room for 4 MiB.
    pub fn small(self, folder: &Path) -> Surroundings {
        self.step(Step::Small(text(folder)))
    }

    /// A directory on a file system that is mounted read-only.
    pub fn read_only(self, folder: &Path) -> Surroundings {
        self.step(Step::ReadOnly(text(folder)))
    }

    /// A limit, as `ulimit` sets it.
    pub fn limit(mut self, resource: libc::__rlimit_resource_t, value: u64) -> Surroundings {
        self.steps.push(Step::Limit(resource, value));
        self
    }

    /// A user without any right. What Hull needs from then on has to be there for everybody.
    pub fn user(mut self, id: libc::uid_t) -> Surroundings {
        self.user = Some(id);
        self
    }

    fn step(mut self, step: Step) -> Surroundings {
        self.namespace = true;
        self.steps.push(step);
        self
    }

    /// The user that the command runs as, if that is another one.
    pub(crate) fn other_user(&self) -> Option<libc::uid_t> {
        self.user
    }

    /// Makes `command` start in these surroundings.
    pub(crate) fn prepare(mut self, command: &mut Command) {
        // Last: it cannot do any of the others.
        self.steps.extend(self.user.map(Step::User));
        // SAFETY: system calls with arguments that were made before, and nothing that allocates,
        // which is all that may happen between fork and exec.
        unsafe {
            command.pre_exec(move || {
                if self.namespace {
                    check(libc::unshare(libc::CLONE_NEWNS))?;
                    mount(None, c"/", libc::MS_REC | libc::MS_PRIVATE)?;
                }
                self.steps.iter().try_for_each(Step::take)
            });
        }
    }
}

fn check(value: libc::c_int) -> io::Result<()> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Mounts a file system that is there already, or one in memory if there is no `source`.
fn mount(source: Option<&CStr>, target: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    let source = source.map_or(c"tmpfs".as_ptr(), CStr::as_ptr);
    // SAFETY: texts that end in NUL; the rest are numbers and what tmpfs takes as options.
    check(unsafe {
        libc::mount(source, target.as_ptr(), c"tmpfs".as_ptr(), flags, options(flags).cast())
    })
}

fn options(flags: libc::c_ulong) -> *const libc::c_char {
    if flags == 0 { c"mode=755".as_ptr() } else { ptr::null() }
}

impl Step {
    fn take(&self) -> io::Result<()> {
        // SAFETY: texts that end in NUL, numbers, and structures that outlive their calls.
        unsafe {
            match self {
                Step::Empty(path) => mount(None, path, 0),
                Step::Small(path) => {
                    let (tmpfs, options) = (c"tmpfs".as_ptr(), c"size=4m".as_ptr());
                    check(libc::mount(tmpfs, path.as_ptr(), tmpfs, 0, options.cast()))
                }
                Step::Folder(path) => check(libc::mkdir(path.as_ptr(), 0o755)),
                Step::Node(path, mode, group, number) => {
                    check(libc::mknod(path.as_ptr(), libc::S_IFCHR | mode, *number))?;
                    // Without the mask that mknod obeys.
                    check(libc::chmod(path.as_ptr(), *mode))?;
                    check(libc::chown(path.as_ptr(), 0, *group))
                }
                Step::NoDevices => mount(None, c"/dev", libc::MS_REMOUNT | libc::MS_NODEV),
                Step::ReadOnly(path) => {
                    mount(Some(path), path, libc::MS_BIND)?;
                    mount(None, path, libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY)
                }
                Step::Limit(resource, value) => {
                    let limit = libc::rlimit { rlim_cur: *value, rlim_max: *value };
                    check(libc::setrlimit(*resource, &raw const limit))
                }
                Step::User(id) => {
                    check(libc::setgroups(0, ptr::null()))?;
                    check(libc::setresgid(*id, *id, *id))?;
                    check(libc::setresuid(*id, *id, *id))
                }
            }
        }
    }
}
