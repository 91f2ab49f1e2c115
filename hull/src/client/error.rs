//! What goes wrong between a command and a machine's API, and what a person can do about it.

use std::io;
use std::path::PathBuf;

/// Why a machine could not be asked, or did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no file.
    #[error("there is no socket {}", .0.display())]
    NoSocket(PathBuf),
    /// The machine was started without one.
    #[error("{0} has no API")]
    NoApi(String),
    /// There is a file, and it is none.
    #[error("{} is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Who listened there is gone.
    #[error("nobody listens on {}", .0.display())]
    Stale(PathBuf),
    /// The socket, or a directory above it, is another user's.
    #[error("this user may not use {}", path.display())]
    Permission {
        /// The socket.
        path: PathBuf,
        /// The user whose it is, if that can be seen.
        owner: Option<u32>,
    },
    /// The socket cannot be used for another reason.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// No answer came in time.
    #[error("{who} did not answer within {seconds} s")]
    Silent {
        /// The machine, as the user named it.
        who: String,
        /// How long it was waited for.
        seconds: f32,
    },
    /// The connection ended before the answer, or what came is no HTTP.
    #[error("{who} did not answer properly")]
    Broken {
        /// The machine, as the user named it.
        who: String,
        /// What happened.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer is HTTP, and not what this API answers.
    #[error("{who} answered with something else than {expected}")]
    Odd {
        /// The machine, as the user named it.
        who: String,
        /// What was to be expected.
        expected: &'static str,
    },
    /// The API has no such resource, as Firecracker's may not.
    #[error("the API of {who} has no {method} {path}")]
    Lacking {
        /// The machine, as the user named it.
        who: String,
        /// What was to be done.
        method: String,
        /// With what.
        path: String,
    },
    /// No disk has this id.
    #[error("{who} has no disk {disk:?}{others}")]
    NoDisk {
        /// The machine, as the user named it.
        who: String,
        /// The id that was asked for.
        disk: String,
        /// The ids that there are, or nothing.
        others: String,
    },
    /// The request was refused.
    #[error("{who} refused: {message}")]
    Refused {
        /// The machine, as the user named it.
        who: String,
        /// Its reason.
        message: String,
    },
    /// What was waited for cannot come any more.
    #[error("{who} stopped{how} before there was an event `{event}`")]
    Stopped {
        /// The machine, as the user named it.
        who: String,
        /// The event that was waited for.
        event: String,
        /// How it stopped, in parentheses, or nothing.
        how: String,
    },
    /// Events end without the one that says why.
    #[error("{who} is gone: its events ended without a reason")]
    Gone {
        /// The machine, as the user named it.
        who: String,
    },
    /// There is no event loop.
    #[error("cannot wait for answers")]
    Runtime(#[source] io::Error),
    /// A path that JSON has no place for.
    #[error("{} is not UTF-8, and JSON has no other paths", .0.display())]
    NotUtf8(PathBuf),
}

impl ClientError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            ClientError::NoApi(_) => "start it without --no-api; `hull stop` ends it all the same",
            ClientError::NoSocket(_) => {
                "a machine's API goes with its process; `hull ps` lists the machines that run"
            }
            ClientError::NotASocket(_) => {
                "give the name of a machine (`hull ps`), or the socket of its API"
            }
            ClientError::Stale(path) => {
                return Some(format!(
                    "the process that made it is gone: `rm {}`; `hull ps` lists the machines that \
                     run",
                    path.display()
                ));
            }
            ClientError::Permission { owner: Some(owner), .. } => {
                return Some(format!(
                    "it is for its owner alone, who is user {owner}: become that user, or root"
                ));
            }
            ClientError::Permission { owner: None, .. } => {
                "it is for its owner alone: become that user, or root"
            }
            ClientError::Silent { .. } => {
                "its process hangs or was halted; what it was asked for may still be done. \
                 `hull stop` ends it in any case"
            }
            ClientError::Broken { .. } => {
                "it may have ended this very moment, or something else listens there; `hull ps` \
                 lists the machines that run"
            }
            ClientError::Lacking { path, .. } if path.starts_with("/metrics") => {
                "Firecracker writes its metrics to the file that `PUT /metrics` names"
            }
            ClientError::Lacking { .. } => "Firecracker's API does less than Hull's",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}
