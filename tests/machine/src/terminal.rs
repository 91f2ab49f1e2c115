//! A terminal for a guest to be on: a pseudo-terminal, whose other end is the test.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Both ends of a pseudo-terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// What the person sees and types on.
    pub(crate) person: File,
    program: File,
    /// The mode that it had before Hull came.
    before: Mode,
}

/// Gives a terminal settings that nobody would take for the usual ones.
fn tinker(terminal: &File) {
    // SAFETY: termios is plain data, which tcgetattr fills and tcsetattr reads.
    unsafe {
        let mut termios: libc::termios = std::mem::zeroed();
        let got = libc::tcgetattr(terminal.as_raw_fd(), &raw mut termios);
        termios.c_iflag ^= libc::IXANY;
        termios.c_lflag ^= libc::ECHOCTL;
        termios.c_cc[libc::VINTR] = 0x0b;
        let set = libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &raw const termios);
        assert_eq!((got, set), (0, 0), "no terminal: {}", io::Error::last_os_error());
    }
}

/// The mode of a terminal, to be compared.
#[derive(Debug, PartialEq, Eq)]
struct Mode {
    input: libc::tcflag_t,
    output: libc::tcflag_t,
    control: libc::tcflag_t,
    local: libc::tcflag_t,
    characters: Vec<libc::cc_t>,
}

fn mode(terminal: &File) -> Mode {
    // SAFETY: termios is plain data, which tcgetattr fills.
    let termios = unsafe {
        let mut termios: libc::termios = std::mem::zeroed();
        let got = libc::tcgetattr(terminal.as_raw_fd(), &raw mut termios);
        assert_eq!(got, 0, "no terminal: {}", io::Error::last_os_error());
        termios
    };
    Mode {
        input: termios.c_iflag,
        output: termios.c_oflag,
        control: termios.c_cflag,
        local: termios.c_lflag,
        characters: termios.c_cc.to_vec(),
    }
}

impl Terminal {
    /// A terminal of that size, in a mode of somebody's own.
    pub(crate) fn open(columns: u16, rows: u16) -> Terminal {
        let (mut person, mut program) = (-1, -1);
        let size = libc::winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: openpty fills the two numbers and reads the size; the descriptors are then ours.
        let (person, program) = unsafe {
            let none = std::ptr::null_mut();
            let made = libc::openpty(
                &raw mut person,
                &raw mut program,
                none,
                none.cast(),
                &raw const size,
            );
            assert_eq!(made, 0, "no pseudo-terminal: {}", io::Error::last_os_error());
            (File::from_raw_fd(person), File::from_raw_fd(program))
        };
        tinker(&program);
        let before = mode(&program);
        Terminal { person, program, before }
    }

    /// Makes this the controlling terminal of a command, and its stdin and stdout.
    pub(crate) fn hand_to(&self, command: &mut Command) -> io::Result<()> {
        command.stdin(Stdio::from(self.program.try_clone()?));
        command.stdout(Stdio::from(self.program.try_clone()?));
        // SAFETY: two system calls, which are all that may happen between fork and exec.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Ok(())
    }

    /// Changes the size, as a person who drags a window's corner.
    pub(crate) fn resize(&self, columns: u16, rows: u16) {
        let size = libc::winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCSWINSZ reads one winsize.
        let set =
            unsafe { libc::ioctl(self.person.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(set, 0, "cannot resize: {}", io::Error::last_os_error());
    }

    /// True if no key is the terminal's own business now.
    pub(crate) fn is_raw(&self) -> bool {
        mode(&self.program).local & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }

    /// Ends the terminal's life on the program's side. Panics if it was not left as it was found.
    pub(crate) fn close(self) {
        assert_eq!(mode(&self.program), self.before, "the terminal was not restored");
    }
}
