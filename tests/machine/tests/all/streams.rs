//! What surrounds a machine: its log's reader, standard streams that take nothing, the terminal,
//! signals, the pid file.

use machine_tests::{Guest, HULL, PAYLOAD, Running};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `done` says so.
fn soon(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Hull with standard streams of the test's choice, which [`Guest`] does not have.
struct Hull {
    command: Command,
    folder: TempDir,
}

impl Hull {
    fn new(arguments: &[&dyn AsRef<OsStr>]) -> Hull {
        Hull::started_by(Command::new(&*HULL), arguments)
    }

    /// Hull as the last arguments of another command.
    fn started_by(mut command: Command, arguments: &[&dyn AsRef<OsStr>]) -> Hull {
        let folder = tempfile::tempdir().unwrap();
        for argument in arguments {
            command.arg(argument);
        }
        command.env("XDG_RUNTIME_DIR", folder.path()).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Hull { command, folder }
    }

    fn run(scenario: &str, arguments: &[&dyn AsRef<OsStr>]) -> Hull {
        let cmdline = format!("payload={scenario}");
        let mut all: Vec<&dyn AsRef<OsStr>> =
            vec![&"run", &"--memory", &"64M", &"--kernel", &*PAYLOAD, &"--cmdline", &cmdline];
        all.extend(arguments);
        Hull::new(&all)
    }

    fn start(mut self) -> (Child, TempDir) {
        let child = self.command.spawn().unwrap();
        (child, self.folder)
    }

    /// Its exit code.
    fn end(self) -> i32 {
        let (child, folder) = self.start();
        end(child, &folder)
    }
}

/// Waits for the end, and makes sure that nothing is left.
fn end(mut child: Child, folder: &TempDir) -> i32 {
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("Hull does not end");
            }
        }
    };
    if let Ok(left) = std::fs::read_dir(folder.path().join("hull")) {
        assert_eq!(left.flatten().map(|entry| entry.file_name()).collect::<Vec<_>>(), [""; 0]);
    }
    status.code().or(status.signal().map(|signal| 128 + signal)).unwrap()
}

fn signal(id: u32, signal: i32) {
    // SAFETY: no memory arguments.
    assert_eq!(unsafe { libc::kill(id as libc::pid_t, signal) }, 0);
}

/// A pipe that does not take much, and how many bytes that is.
fn small_pipe() -> (PipeReader, PipeWriter, usize) {
    let (reader, writer) = std::io::pipe().unwrap();
    // SAFETY: no memory arguments.
    let size = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) };
    (reader, writer, usize::try_from(size).unwrap())
}

/// A pipe that takes no more, and how many bytes it holds.
fn full_pipe() -> (PipeReader, PipeWriter, usize) {
    let (reader, mut writer, size) = small_pipe();
    writer.write_all(&vec![b'.'; size]).unwrap();
    (reader, writer, size)
}

fn full_device() -> Stdio {
    Stdio::from(File::options().write(true).open("/dev/full").unwrap())
}

/// A guest that makes Hull log warnings for as long as it runs.
fn offender() -> Hull {
    Hull::run("hostile dev=rng case=all", &[&"--rng", &"--on-reboot", &"restart"])
}

/// Reads until `text` has come.
fn read_until(from: &impl AsFd, text: &str) -> String {
    let mut from = File::from(from.as_fd().try_clone_to_owned().unwrap());
    let mut all = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let so_far = String::from_utf8_lossy(&all);
        if so_far.contains(text) {
            return so_far.into_owned();
        }
        assert!(Instant::now() < deadline, "no {text:?} in {so_far}");
        let mut poll = libc::pollfd { fd: from.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        if unsafe { libc::poll(&mut poll, 1, 10) } == 1 {
            let mut buffer = [0; 4096];
            let length = from.read(&mut buffer).unwrap();
            assert!(length > 0, "the end came before {text:?}: {}", String::from_utf8_lossy(&all));
            all.extend(&buffer[..length]);
        }
    }
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let (_reader, writer, _) = full_pipe();
    let (output, console) = std::io::pipe().unwrap();
    let mut hull = offender();
    hull.command.stdout(console).stderr(writer);
    let (child, folder) = hull.start();
    // Twice: the first machine has come to its end, whatever was logged.
    read_until(&output, "result ");
    read_until(&output, "result ");
    signal(child.id(), libc::SIGTERM);
    assert_eq!(end(child, &folder), 143);
}

#[test]
fn lines_that_found_no_room_are_counted() {
    let (mut reader, writer, size) = full_pipe();
    let (output, console) = std::io::pipe().unwrap();
    let mut hull = offender();
    hull.command.stdout(console).stderr(writer);
    let (child, folder) = hull.start();
    read_until(&output, "result ");
    reader.read_exact(&mut vec![0; size]).unwrap();
    // The next machine runs: a signal before that ends Hull on the spot.
    read_until(&output, "hostile ");
    signal(child.id(), libc::SIGTERM);
    assert_eq!(end(child, &folder), 143);
    let said = read_until(&reader, "lines were dropped");
    let number: u32 = said.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
    assert!((1..1000).contains(&number), "{said}");
}

/// Types until nothing takes any more of it; returns how many bytes were taken.
fn type_until_stuck(keyboard: &mut PipeWriter) -> usize {
    // SAFETY: no memory arguments.
    let set = unsafe { libc::fcntl(keyboard.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    assert_eq!(set, 0);
    let (mut typed, mut last) = (0, Instant::now());
    // Longer than a busy host leaves a machine alone.
    while last.elapsed() < Duration::from_secs(2) {
        match keyboard.write(&[b'.'; 512]) {
            Ok(length) => (typed, last) = (typed + length, Instant::now()),
            Err(err) if err.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(err) => panic!("cannot type: {err}"),
        }
        assert!(typed < 4 << 20, "{typed} bytes went somewhere");
    }
    typed
}

#[test]
fn a_console_that_nobody_reads() {
    // The guest sends back what is typed. Nobody looks, so in the end it has to wait, and who types with
    // it; the machine can be ended all the same.
    let mut hull = Hull::run("console", &[&"--console", &"stdio,device=virtio"]);
    let (output, console, _) = small_pipe();
    let (input, mut keyboard, _) = small_pipe();
    hull.command.stdin(input).stdout(console);
    let (child, folder) = hull.start();
    read_until(&output, "ready");
    let typed = type_until_stuck(&mut keyboard);
    assert!(typed > 4096, "{typed}");
    signal(child.id(), libc::SIGTERM);
    assert_eq!(end(child, &folder), 143);
}

#[test]
fn a_flood_that_nobody_reads() {
    let mut hull = Hull::run("serialflood size=1M", &[]);
    let (output, console, _) = small_pipe();
    let (log, words) = std::io::pipe().unwrap();
    hull.command.stdout(console).stderr(words);
    let (mut child, folder) = hull.start();
    read_until(&output, "0123");
    let waits = || {
        let read =
            |task: &Path, name: &str| std::fs::read_to_string(task.join(name)).unwrap_or_default();
        let futex = format!("{} ", libc::SYS_futex);
        let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().flatten();
        tasks.map(|task| task.path()).any(|task| {
            read(&task, "comm").starts_with("vcpu") && read(&task, "syscall").starts_with(&futex)
        })
    };
    soon("a vCPU that waits for a reader", waits);
    // It has not come to its end, nor does it.
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none());
    signal(child.id(), libc::SIGTERM);
    assert_eq!(end(child, &folder), 143);
    read_until(&log, "nobody reads the console; the rest of its output is lost");
}

#[test]
fn streams_that_take_nothing_are_no_panic() {
    let closed = || Stdio::from(std::io::pipe().unwrap().1);
    let with = |mut hull: Hull, out: Stdio, err: Stdio| {
        hull.command.stdout(out).stderr(err);
        hull.end()
    };
    let null = Stdio::null;
    let print = || Hull::run("hello", &[&"--print-config"]);
    assert_eq!(with(print(), full_device(), null()), 1);
    assert_eq!(with(print(), closed(), null()), 0);
    for subcommand in [&["completions", "bash"][..], &["man"], &["ps"], &["doctor"]] {
        let arguments: Vec<&dyn AsRef<OsStr>> =
            subcommand.iter().map(|word| word as &dyn AsRef<OsStr>).collect();
        let code = with(Hull::new(&arguments), full_device(), full_device());
        assert_eq!(code, 1, "{subcommand:?}");
    }
    for err in [full_device, closed] {
        let run = |scenario: &str, more: &[&dyn AsRef<OsStr>]| {
            with(Hull::run(scenario, more), null(), err())
        };
        assert_eq!(run("hello", &[&"--timings"]), 0);
        assert_eq!(run("hello", &[&"--timings=json"]), 0);
        assert_eq!(run("triple", &[]), 3);
        assert_eq!(run("hello", &[&"--console", &"file=/nowhere/at/all"]), 1);
        assert_eq!(run("hello", &[&"--cpus", &"0"]), 2);
    }
}

#[test]
fn control_characters_of_a_file_name_are_not_obeyed() {
    let outcome = Guest::bare().option("--kernel", "no\u{1b}[2Jpe\u{9b}").run();
    outcome.refused(&["no\\u{1b}[2Jpe\\u{9b}"]);
    assert!(!outcome.stderr.chars().any(|char| char.is_control() && char != '\n'));
}

/// A guest that runs on a terminal in raw mode.
fn on_terminal() -> Running {
    let guest = Guest::new("echo").console("tty").on_terminal(80, 24).start();
    guest.wait_for("ready");
    assert!(guest.is_raw());
    guest
}

#[test]
fn signals_that_end_a_machine_leave_nothing() {
    let signals = [libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGALRM, libc::SIGHUP];
    for number in signals {
        let guest = on_terminal();
        guest.signal(number);
        // The terminal is checked there.
        let outcome = guest.finish();
        assert_eq!(outcome.status.code(), Some(128 + number));
        assert!(outcome.left.is_empty(), "{:?}", outcome.left);
    }
}

#[test]
fn fatal_signals_put_the_terminal_back() {
    for number in [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGABRT,
        libc::SIGVTALRM,
        libc::SIGPROF,
        libc::SIGXCPU,
    ] {
        let guest = on_terminal();
        guest.signal(number);
        let outcome = guest.finish();
        assert_eq!(outcome.status.signal(), Some(number), "{:?}", outcome.status);
        assert!(outcome.left.is_empty(), "{:?}", outcome.left);
    }
}

/// A terminal with a shell on it; the shell's end of the terminal is closed here.
fn shell_on_terminal(script: &str, arguments: &[&dyn AsRef<OsStr>]) -> (File, Child, TempDir) {
    let (mut person, mut program) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: openpty fills the two numbers; the descriptors are then ours.
    let (person, program) = unsafe {
        let made = libc::openpty(&mut person, &mut program, none, none.cast(), none.cast());
        assert_eq!(made, 0);
        (File::from_raw_fd(person), File::from_raw_fd(program))
    };
    let mut command = Command::new("sh");
    command.args(["-m", "-c", script]).arg(&*HULL);
    let mut hull = Hull::started_by(command, arguments);
    hull.command.stdin(program.try_clone().unwrap());
    hull.command.stdout(program.try_clone().unwrap()).stderr(program);
    // SAFETY: two system calls, which are all that may happen between fork and exec.
    unsafe {
        hull.command.pre_exec(|| {
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let (child, folder) = hull.start();
    (person, child, folder)
}

/// The processes of a shell's session, stopped ones too: ended when dropped, for a test that failed.
struct Session(u32);

impl Drop for Session {
    fn drop(&mut self) {
        for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Ok(id) = process.file_name().to_string_lossy().parse::<i32>() else { continue };
            // SAFETY: the calls have no memory arguments; the session was made by this test.
            unsafe {
                if libc::getsid(id) == self.0 as i32 {
                    libc::kill(id, libc::SIGKILL);
                }
            }
        }
    }
}

fn mode(terminal: &File) -> libc::termios {
    // SAFETY: termios is plain data, which tcgetattr fills.
    unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &mut mode), 0);
        mode
    }
}

const COOKED: libc::tcflag_t = libc::ICANON | libc::ECHO | libc::ISIG;

fn is_raw(terminal: &File) -> bool {
    mode(terminal).c_lflag & COOKED == 0
}

/// Ends raw mode as far as the test needs it.
fn cook(terminal: &File) {
    let mut mode = mode(terminal);
    mode.c_lflag |= COOKED;
    // SAFETY: one valid termios.
    assert_eq!(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &mode) }, 0);
}

#[test]
fn a_shell_gets_its_terminal_while_the_machine_is_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let pidfile = folder.path().join("pid");
    let (mut terminal, shell, runtime) = shell_on_terminal(
        r#""$0" "$@"; echo "first $?"; read x; fg; echo "second $?"; read x; fg; echo "end $?""#,
        &[
            &"run",
            &"--memory",
            &"64M",
            &"--kernel",
            &*PAYLOAD,
            &"--cmdline",
            &"payload=echo",
            &"--pidfile",
            &pidfile,
        ],
    );
    let _session = Session(shell.id());
    read_until(&terminal, "ready");
    assert!(is_raw(&terminal));
    let id: u32 = std::fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap();
    signal(id, libc::SIGTSTP);
    read_until(&terminal, "first ");
    assert!(!is_raw(&terminal));
    terminal.write_all(b"\n").unwrap();
    soon("raw mode", || is_raw(&terminal));
    terminal.write_all(b"still there?").unwrap();
    read_until(&terminal, "still there?");
    // This one leaves no time to put the terminal back. Some shells do; then it is raw again when
    // the machine goes on.
    signal(id, libc::SIGSTOP);
    read_until(&terminal, "second ");
    assert!(is_raw(&terminal));
    cook(&terminal);
    terminal.write_all(b"\n").unwrap();
    soon("raw mode", || is_raw(&terminal));
    terminal.write_all(b"and now?q").unwrap();
    read_until(&terminal, "end 0");
    assert!(!is_raw(&terminal));
    assert_eq!(end(shell, &runtime), 0);
}

#[test]
fn signals_that_the_caller_ignores_stay_ignored() {
    let mut command = Command::new("sh");
    command.args(["-c", r#"trap "" HUP INT USR1; exec "$0" "$@""#]).arg(&*HULL);
    let mut hull = Hull::started_by(
        command,
        &[&"run", &"--memory", &"64M", &"--kernel", &*PAYLOAD, &"--cmdline", &"payload=echo"],
    );
    let (output, console) = std::io::pipe().unwrap();
    let (input, mut keyboard) = std::io::pipe().unwrap();
    hull.command.stdin(input).stdout(console);
    let (child, folder) = hull.start();
    read_until(&output, "ready");
    for number in [libc::SIGHUP, libc::SIGINT, libc::SIGUSR1] {
        signal(child.id(), number);
    }
    keyboard.write_all(b"still there?").unwrap();
    read_until(&output, "still there?");
    signal(child.id(), libc::SIGTERM);
    assert_eq!(end(child, &folder), 143);
}

#[test]
fn a_signal_at_any_time_of_the_start_leaves_nothing() {
    // The last ones while KVM gets to know much memory, which is another way out.
    let steps = (0..40).map(|step| (step * 500, "64M"));
    for (step, memory) in steps.chain((0..8).map(|step| (step * 10_000, "24G"))) {
        let pids = tempfile::tempdir().unwrap();
        let pidfile = pids.path().join("pid");
        let hull = Hull::new(&[
            &"run",
            &"--memory",
            &memory,
            &"--kernel",
            &*PAYLOAD,
            &"--cmdline",
            &"payload=halt",
            &"--pidfile",
            &pidfile,
        ]);
        let (child, folder) = hull.start();
        std::thread::sleep(Duration::from_micros(step));
        signal(child.id(), libc::SIGTERM);
        let code = end(child, &folder);
        assert_eq!(code, 143, "{memory} after {step} µs");
        assert!(!pidfile.exists(), "{memory} after {step} µs");
    }
}

#[test]
fn pid_files_of_others_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let refused = |pidfile: &Path, word: &str| {
        Guest::new("hello").option("--pidfile", pidfile).run().failed(&[word]);
    };
    let precious = path("precious");
    std::fs::write(&precious, "precious").unwrap();
    std::fs::set_permissions(&precious, PermissionsExt::from_mode(0o444)).unwrap();
    refused(&precious, "/precious does not hold a process id; it is not overwritten");
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "precious");

    let target = path("target");
    std::fs::write(&target, "1\n").unwrap();
    let link = path("link");
    std::os::unix::fs::symlink(&target, &link).unwrap();
    refused(&link, "link");
    assert!(link.is_symlink());
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "1\n");

    let fifo = path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    refused(&fifo, "regular file");
    assert!(std::fs::metadata(&fifo).unwrap().file_type().is_fifo());
}

#[test]
fn a_pid_file_belongs_to_one_machine() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pid");
    std::fs::write(&file, "999999999\n").unwrap();
    let first = Guest::new("halt").option("--pidfile", &file).start();
    first.wait_for("halting");
    let id = format!("{}\n", first.id());
    Guest::new("hello")
        .option("--pidfile", &file)
        .run()
        .failed(&["belongs to a process that lives"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), id);
    // Somebody else's by the time that it ends.
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, "another").unwrap();
    let inode = std::fs::metadata(&file).unwrap().ino();
    first.signal(libc::SIGTERM);
    assert_eq!(first.finish().code(), 143);
    assert_eq!(std::fs::metadata(&file).unwrap().ino(), inode);
}
