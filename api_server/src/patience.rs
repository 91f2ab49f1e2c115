//! A stream whose other side may be silent between requests for as long as it likes, but not in the
//! middle of a request's head. hyper's own limit closes connections that are kept for later as well.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::{Instant, Sleep};

/// How long a client may take to send the head of a request.
const PATIENCE: Duration = Duration::from_secs(10);

/// Says when a request's head has been read, until its answer is ready.
#[derive(Clone, Debug, Default)]
pub struct Busy(Arc<AtomicBool>);

impl Busy {
    /// A head was read, or an answer is ready.
    pub fn set(&self, busy: bool) {
        self.0.store(busy, Ordering::Relaxed);
    }
}

/// The side of the stream that is read.
pub struct Patient<S> {
    stream: S,
    busy: Busy,
    /// Runs out if a head that began does not end.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    /// `stream`, with limits when it is not `busy`.
    pub fn new(stream: S, busy: Busy) -> Patient<S> {
        Patient { stream, busy, timer: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(context, buffer);
        if this.busy.0.load(Ordering::Relaxed) {
            this.timer = None;
            return polled;
        }
        if polled.is_ready() {
            if buffer.filled().len() > before && this.timer.is_none() {
                let end = Instant::now() + PATIENCE;
                this.timer = Some(Box::pin(tokio::time::sleep_until(end)));
            }
            return polled;
        }
        let Some(timer) = &mut this.timer else { return Poll::Pending };
        ready!(timer.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}
