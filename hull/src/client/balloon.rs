//! `hull balloon`.

use hyper::Method;
use serde_json::{Value, json};

use super::error::ClientError;
use super::http::{Api, PATIENCE};
use super::machine::Machine;
use super::show;
use crate::cli::{BalloonArgs, Result};
use crate::exit::Code;
use crate::streams;
use crate::table::Table;

/// Gives the balloon of a running machine another size or interval, or shows how it stands.
pub fn balloon(args: &BalloonArgs) -> Result {
    let machine = Machine::find(&args.machine.machine)?;
    let change = args.size.is_some() || args.stats_interval.is_some();
    let shown = super::block_on(async {
        let mut api = Api::connect(&machine, PATIENCE).await?;
        if let Some(size) = args.size {
            api.send(Method::PATCH, "/balloon", &json!({ "amount_mib": size })).await?;
        }
        if let Some(seconds) = args.stats_interval {
            let interval = json!({ "stats_polling_interval_s": seconds });
            api.send(Method::PATCH, "/balloon/statistics", &interval).await?;
        }
        match change {
            true => Ok(None),
            false => look(&mut api).await.map(Some),
        }
    })?;
    if let Some((balloon, statistics)) = shown {
        let text = match args.json {
            true => show::json(&json!({ "balloon": balloon, "statistics": statistics }))?,
            false => table(&balloon, &statistics),
        };
        streams::print(&text)?;
    }
    Ok(Code::SUCCESS)
}

/// The balloon as it is configured, and what the guest said, if it was asked.
async fn look(api: &mut Api) -> std::result::Result<(Value, Value), ClientError> {
    let balloon = api.get("/balloon").await?;
    match api.get("/balloon/statistics").await {
        Ok(statistics) => Ok((balloon, statistics)),
        // The machine was not started, or the guest is not to be asked.
        Err(ClientError::Refused { .. }) => Ok((balloon, Value::Null)),
        Err(error) => Err(error),
    }
}

fn table(balloon: &Value, statistics: &Value) -> String {
    let mut table = Table::new(["BALLOON", "VALUE"]);
    for part in [balloon, statistics] {
        for (key, value) in show::flat(part) {
            table.push([key, value]);
        }
    }
    table.to_string()
}
