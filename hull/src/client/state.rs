//! In which state machines are, for `hull ps`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::error::ClientError;
use super::http::Api;
use super::machine::Machine;

/// How long a machine gets to say how it is.
const PATIENCE: Duration = Duration::from_millis(300);

/// Machines that are asked at a time: each of them takes a descriptor.
const AT_A_TIME: usize = 64;

/// The states of the machines with these APIs, in this order: `running`, `paused`, `not-started`.
/// `None` is the state of one that does not say.
pub async fn states(sockets: Vec<PathBuf>) -> Result<Vec<Option<String>>, ClientError> {
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    let questions: Vec<_> = sockets
        .into_iter()
        .map(|socket| {
            let places = Arc::clone(&places);
            tokio::spawn(async move {
                let _place = places.acquire_owned().await.ok()?;
                timeout(PATIENCE, state(socket)).await.ok()?
            })
        })
        .collect();
    let mut states = Vec::with_capacity(questions.len());
    for question in questions {
        states.push(question.await.ok().flatten());
    }
    Ok(states)
}

async fn state(socket: PathBuf) -> Option<String> {
    let machine = Machine { name: String::new(), socket };
    let mut api = Api::connect(&machine, PATIENCE).await.ok()?;
    let info = api.get("/").await.ok()?;
    // `Not started` becomes one word, for those who cut columns.
    Some(info.get("state")?.as_str()?.to_lowercase().replace(' ', "-"))
}
