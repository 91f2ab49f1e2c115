//! What the guest's metadata service has to say, before the start and after it.

use std::sync::Arc;

use axum::http::StatusCode;

use serde_json::{Map, Value};
use tokio::sync::oneshot;
use vmm::machine::{Command, Handle, Message, Reply, initial_metadata};

use super::{Inner, Instance, Phase};
use crate::fault::{DONE, Done, Fault};
use crate::types::mmds::{MmdsConfig, json_len};

impl Inner {
    /// Sends the cards that serve metadata what there is of it. Nobody waits: what is sent in this
    /// order, under this lock, arrives in it.
    pub(super) fn tell_metadata(&self, handle: &Handle) -> Vec<oneshot::Receiver<Reply>> {
        let (Some(mmds), Some(contents)) = (&self.config.mmds, &self.metadata) else {
            return Vec::new();
        };
        let cards = (0..self.config.net.len()).map(|n| self.config.net_name(n));
        cards
            .filter(|card| mmds.is_on(card))
            .map(|device| {
                let (sender, receiver) = oneshot::channel();
                let message = Message::Metadata(Arc::clone(contents));
                let reply = Box::new(move |reply| drop(sender.send(reply)));
                handle.send(Command::Update { device, message }, reply);
                receiver
            })
            .collect()
    }
}

impl Instance {
    /// Gives the guest a metadata service.
    ///
    /// # Errors
    /// See [`Instance::configure`]; a card or the address is not one for it.
    pub fn put_mmds(&self, mmds: MmdsConfig) -> Done {
        self.configure(|config| {
            let known = |id: &str| config.net.iter().any(|net| net.id.as_deref() == Some(id));
            config.mmds = Some(mmds.checked(known)?);
            Ok(())
        })
    }

    /// What the guest finds: an empty object until something was put.
    pub fn metadata(&self) -> Value {
        let contents = self.lock().metadata.clone();
        contents.map_or_else(|| Value::Object(Map::new()), |contents| (*contents).clone())
    }

    /// Has the guest find `contents`.
    ///
    /// # Errors
    /// It is more than [`Limits::metadata`](super::Limits::metadata); the machine is gone.
    pub async fn put_metadata(&self, contents: Value) -> Done {
        let told = self.change_metadata(|_| Ok(contents))?;
        heard(told).await
    }

    /// As [`Instance::put_metadata`], when no machine runs yet.
    ///
    /// # Errors
    /// It is more than [`Limits::metadata`](super::Limits::metadata).
    pub fn preset_metadata(&self, contents: Value) -> Done {
        self.change_metadata(|_| Ok(contents)).map(|_| DONE)
    }

    /// Has the guest find what the file of the configuration says, if there is one.
    ///
    /// # Errors
    /// The file cannot be read, is no JSON or too large.
    pub fn initialise_metadata(&self) -> Done {
        match self.config().mmds.filter(|mmds| mmds.path.is_some()) {
            Some(mmds) => {
                let contents = initial_metadata(&mmds);
                self.preset_metadata(
                    contents.map_err(|why| Fault::bad(format!("cannot set up mmds: {why}")))?,
                )
            }
            None => Ok(DONE),
        }
    }

    /// Changes what the guest finds by a JSON merge patch (RFC 7396).
    ///
    /// # Errors
    /// Nothing was put yet; as [`Instance::put_metadata`].
    pub async fn patch_metadata(&self, patch: &Value) -> Done {
        let told = self.change_metadata(|contents| {
            let contents = contents
                .ok_or_else(|| Fault::bad("MMDS error: The MMDS data store is not initialized."))?;
            let mut contents = contents.clone();
            merge(&mut contents, patch);
            Ok(contents)
        })?;
        heard(told).await
    }

    /// Puts the contents that `change` makes of those there are, and tells a running machine.
    fn change_metadata(
        &self,
        change: impl FnOnce(Option<&Value>) -> Result<Value, Fault>,
    ) -> Result<Vec<oneshot::Receiver<Reply>>, Fault> {
        let limit = self.limits.metadata;
        let mut inner = self.lock();
        let contents = change(inner.metadata.as_deref())?;
        let len = json_len(&contents);
        if len > limit {
            let message = format!(
                "MMDS limit exceeded error: The MMDS patch request doesn't fit: {len} bytes of \
                 metadata are more than the limit of {limit}."
            );
            return Err(Fault::with_status(StatusCode::PAYLOAD_TOO_LARGE, message));
        }
        inner.metadata = Some(Arc::new(contents));
        Ok(match &inner.phase {
            Phase::Started(handle) => inner.tell_metadata(handle),
            Phase::Configuring | Phase::Starting => Vec::new(),
        })
    }
}

/// Waits until the machine has what it was told.
async fn heard(told: Vec<oneshot::Receiver<Reply>>) -> Done {
    for reply in told {
        let reply = reply.await.map_err(|_| Fault::gone())?;
        reply.map_err(|refusal| Fault::bad(refusal.to_string()))?;
    }
    Ok(DONE)
}

/// RFC 7396 § 2. As deep as `patch` is, which came as JSON text, whose depth its reader limits.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn patches_are_those_of_the_rfc() {
        // RFC 7396, appendix A.
        for (original, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (
                json!({"a": {"b": "c"}}),
                json!({"a": {"b": "d", "c": null}}),
                json!({"a": {"b": "d"}}),
            ),
            (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a": "b"}), json!(["c"]), json!(["c"])),
            (json!({"a": "foo"}), json!(null), json!(null)),
            (json!({"a": "foo"}), json!("bar"), json!("bar")),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let mut target = original.clone();
            merge(&mut target, &patch);
            assert_eq!(target, result, "{original} with {patch}");
        }
    }
}
