//! HTTP on a Unix socket: connections in, requests out to the routes, on one thread.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::sync::Semaphore;
use vmm::files::{SocketPath, remove_if_same};
use vmm::seccomp::{self, ThreadKind};

use crate::body;
use crate::instance::{Instance, Shared};
use crate::lasting::Lasting;
use crate::patience::{Busy, Patient};
use crate::routes;

/// What a program is called that is in Firecracker's place.
const FIRECRACKER: &str = "Firecracker";
/// Connections at a time. What comes on top waits in the socket's backlog.
const CONNECTIONS: usize = 2048;
/// How long what the system refused is waited for.
const AGAIN: Duration = Duration::from_millis(50);
/// Most bytes of the head of a request.
const HEAD: usize = 16 * 1024;

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Somebody listens there.
    #[error("another process listens on {}", .0.display())]
    InUse(PathBuf),
    /// Something else than a socket is there.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The socket cannot be made.
    #[error("cannot listen on {}", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// No thread, or no event loop in it.
    #[error("cannot start the API's thread")]
    Thread(#[source] io::Error),
}

/// The socket of an API, mode 0600.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    file: SocketFile,
}

/// The file of a socket, removed when dropped unless another has taken its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode number.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A path with a zero byte cannot have been bound.
        if let Ok(path) = CString::new(self.path.as_os_str().as_bytes()) {
            remove_if_same(&path, self.identity);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Socket {
    /// Listens on `path`, however long it is. A socket that a dead process left there is replaced.
    ///
    /// # Errors
    /// [`ServerError`]; nothing is left then.
    pub fn bind(path: &Path) -> Result<Socket, ServerError> {
        let failed = |source| ServerError::Bind { path: path.to_owned(), source };
        let address = SocketPath::of(path).map_err(failed)?;
        if let Ok(metadata) = std::fs::symlink_metadata(path) {
            if !metadata.file_type().is_socket() {
                return Err(ServerError::NotASocket(path.to_owned()));
            }
            match UnixStream::connect(address.as_path()) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path).map_err(failed)?;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Ok(_) | Err(_) => return Err(ServerError::InUse(path.to_owned())),
            }
        }
        // Before anybody can connect: bind(2) takes the mode from the mask, and starts no queue.
        // SAFETY: umask has no memory arguments; there is one thread yet.
        let mask = unsafe { libc::umask(0o177) };
        let bound = UnixListener::bind(address.as_path());
        // SAFETY: as above.
        unsafe { libc::umask(mask) };
        let listener = bound.map_err(failed)?;
        let identity = identity(path).map_err(failed)?;
        let file = SocketFile { path: path.to_owned(), identity };
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Socket { listener, file })
    }

    /// Its file.
    pub fn file(&self) -> &SocketFile {
        &self.file
    }

    /// What there is to be served, and the file, which goes with whoever keeps it.
    pub fn into_parts(self) -> (Listener, SocketFile) {
        (Listener(self.listener), self.file)
    }
}

/// The listening side of a [`Socket`].
#[derive(Debug)]
pub struct Listener(UnixListener);

impl From<Listener> for UnixListener {
    /// Returns at once when nobody is there.
    fn from(Listener(listener): Listener) -> UnixListener {
        listener
    }
}

impl AsRawFd for Listener {
    /// Readable when a client is there.
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Serves `instance` to those who connect to `listener`, on a thread called `api`, for as long as the
/// process lives. What that takes is set up for the first client: there may never be one.
///
/// # Errors
/// [`ServerError::Thread`].
pub fn serve(
    Listener(listener): Listener,
    instance: Instance,
    filter: seccomp::Mode,
) -> Result<(), ServerError> {
    let main = move || {
        if let Err(error) = seccomp::apply(ThreadKind::Api, filter) {
            return tracing::error!(%error, "cannot filter the API's thread");
        }
        wait_for_client(&listener);
        let runtime = event_loop();
        runtime.block_on(async move {
            match tokio::net::UnixListener::from_std(listener) {
                Ok(listener) => accept(listener, Arc::new(instance)).await,
                Err(error) => tracing::error!(%error, "cannot listen"),
            }
        });
    };
    let thread = std::thread::Builder::new().name("api".into()).spawn(main);
    thread.map(drop).map_err(ServerError::Thread)
}

/// Waits until somebody connects, and takes nobody in.
fn wait_for_client(listener: &UnixListener) {
    let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // A failure, such as by a signal, ends the wait: what comes next waits as well.
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, -1) };
}

/// An event loop for this thread, as soon as there are descriptors for one.
fn event_loop() -> tokio::runtime::Runtime {
    loop {
        match tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build() {
            Ok(runtime) => return runtime,
            Err(error) => {
                tracing::warn!(%error, "cannot serve the API yet");
                std::thread::sleep(AGAIN);
            }
        }
    }
}

async fn accept(listener: tokio::net::UnixListener, shared: Shared) {
    let server = HeaderValue::from_static(match shared.program().name {
        FIRECRACKER => "Firecracker API",
        _ => "Hull API",
    });
    let router = routes::router(Arc::clone(&shared));
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut refused = false;
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                refused = false;
                let connection =
                    connection(stream, router.clone(), server.clone(), Arc::clone(&shared));
                tokio::spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(error) => {
                // Out of descriptors: others may be closed in a moment.
                // Once for all that come until somebody is taken in again.
                if !std::mem::replace(&mut refused, true) {
                    tracing::warn!(%error, "cannot accept connections");
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn connection(
    stream: tokio::net::UnixStream,
    router: Router,
    server: HeaderValue,
    shared: Shared,
) {
    let busy = Busy::default();
    let (reader, writer) = stream.into_split();
    let reader = Lasting::new(reader, server.as_bytes().starts_with(FIRECRACKER.as_bytes()));
    let stream = tokio::io::join(Patient::new(reader, busy.clone()), writer);
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let (router, server, busy) = (router.clone(), server.clone(), busy.clone());
        let shared = Arc::clone(&shared);
        busy.set(true);
        async move {
            let request = routes::tolerate(request.map(axum::body::Body::new));
            let (method, path) = (request.method().clone(), request.uri().path().to_owned());
            let mut response = match body::whole(request, body::limit(&path, &shared)).await {
                Ok(request) => call(router, request).await,
                Err(fault) => fault.into_response(),
            };
            let status = response.status();
            let refused = status.is_client_error() || status.is_server_error();
            shared.requests().count(&method, &path, refused);
            response.headers_mut().insert(header::SERVER, server);
            busy.set(false);
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .header_read_timeout(None)
        .max_buf_size(HEAD)
        .pipeline_flush(true)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection ended early");
    }
}

async fn call(router: Router, request: axum::extract::Request) -> Response {
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;
    match TowerToHyperService::new(router).call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
    .into_response()
}
