//! `hull set-disk` and `hull set-net`.

use std::path::Path;

use api_server::types::rate::RateLimiter;
use hyper::Method;
use serde_json::{Map, Value, json};
use vmm::config::RateLimit;

use super::error::ClientError;
use super::http::{Api, PATIENCE, segment};
use super::machine::Machine;
use crate::cli::{Result, SetDiskArgs, SetNetArgs};
use crate::exit::Code;

/// Gives a disk of a running machine another file or limit, or has its file looked at again.
pub fn set_disk(args: &SetDiskArgs) -> Result {
    let machine = Machine::find(&args.machine.machine)?;
    let mut change = Map::from_iter([("drive_id".to_owned(), json!(args.disk))]);
    if let Some(path) = &args.path {
        change.insert("path_on_host".into(), json!(absolute(path)?));
    }
    if let Some(rate) = args.rate {
        change.insert("rate_limiter".into(), limiter(rate)?);
    }
    super::block_on(async {
        let mut api = Api::connect(&machine, PATIENCE).await?;
        if change.len() == 1 {
            change.insert("path_on_host".into(), path_of(&mut api, &args.disk).await?);
        }
        let path = format!("/drives/{}", segment(&args.disk));
        api.send(Method::PATCH, &path, &Value::Object(change)).await
    })?;
    Ok(Code::SUCCESS)
}

/// Limits what a card of a running machine receives or sends.
pub fn set_net(args: &SetNetArgs) -> Result {
    let machine = Machine::find(&args.machine.machine)?;
    let mut change = Map::from_iter([("iface_id".to_owned(), json!(args.card))]);
    let rates = [("rx_rate_limiter", args.rx_rate), ("tx_rate_limiter", args.tx_rate)];
    for (key, rate) in rates.into_iter().filter_map(|(key, rate)| Some((key, rate?))) {
        change.insert(key.into(), limiter(rate)?);
    }
    super::block_on(async {
        let mut api = Api::connect(&machine, PATIENCE).await?;
        let path = format!("/network-interfaces/{}", segment(&args.card));
        api.send(Method::PATCH, &path, &Value::Object(change)).await
    })?;
    Ok(Code::SUCCESS)
}

fn limiter(rate: RateLimit) -> std::result::Result<Value, serde_json::Error> {
    // Buckets that limit nothing too: that is how a limit is taken away.
    let limiter =
        RateLimiter { bandwidth: rate.bandwidth.map(Into::into), ops: rate.ops.map(Into::into) };
    serde_json::to_value(limiter)
}

/// The path as the machine's process finds it, which may run in another directory.
fn absolute(path: &Path) -> Result<String> {
    let path = std::path::absolute(path)?;
    path.into_os_string().into_string().map_err(|path| ClientError::NotUtf8(path.into()).into())
}

/// The file that a disk has already.
async fn path_of(api: &mut Api, disk: &str) -> std::result::Result<Value, ClientError> {
    let config = api.get("/vm/config").await?;
    let drives = config.get("drives").and_then(Value::as_array);
    let drives = drives.map(Vec::as_slice).unwrap_or_default();
    let id = |drive: &Value| drive.get("drive_id").and_then(Value::as_str).map(str::to_owned);
    let found = drives.iter().find(|drive| id(drive).as_deref() == Some(disk));
    if let Some(path) = found.and_then(|drive| drive.get("path_on_host")) {
        return Ok(path.clone());
    }
    let ids: Vec<String> = drives.iter().filter_map(id).collect();
    Err(ClientError::NoDisk {
        who: api.who().to_owned(),
        disk: disk.to_owned(),
        others: match ids.is_empty() {
            true => String::new(),
            false => format!("; there are: {}", ids.join(", ")),
        },
    })
}
