//! `hull disk create|show|commit`: what is done with the files of disks, without a machine.

use std::path::Path;

use serde_json::json;
use vmm::config::ByteSize;
use vmm::devices::virtio::blk::overlay::{
    self, BLOCK, BaseFormat, Described, Header, LayerInfo, Overlay, VERSION,
};

use crate::cli::{DiskArgs, DiskCommand, Result};
use crate::exit::Code;
use crate::spinner::watched;
use crate::streams;
use crate::table::Table;

/// Does something with the files of disks.
pub fn disk(args: &DiskArgs) -> Result {
    match &args.command {
        DiskCommand::Create { overlay, base, base_format } => {
            let format = base_format.map_or(BaseFormat::Raw, BaseFormat::from);
            overlay::create(overlay, base, format)?;
        }
        DiskCommand::Show { overlay, json } => show(overlay, *json)?,
        DiskCommand::Commit { overlay, into, output } => match output {
            Some(output) => {
                watched("copying", |progress| overlay::flatten(overlay, output, progress))?;
            }
            None => {
                if let Some(base) = into {
                    Overlay::open(overlay, true, false)?.expect_base(base)?;
                }
                watched("folding", |progress| overlay::commit(overlay, progress))?;
            }
        },
    }
    Ok(Code::SUCCESS)
}

fn show(
    path: &Path,
    json: bool,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let described = overlay::describe(path)?;
    let text = if json {
        serde_json::to_string_pretty(&as_json(&described))? + "\n"
    } else {
        as_text(&described)
    };
    Ok(streams::print(&text)?)
}

fn hex(id: &overlay::Id) -> String {
    format!("{:032x}", u128::from_be_bytes(*id))
}

fn as_json(described: &Described) -> serde_json::Value {
    let header = |header: &Header| {
        let base = &header.base;
        json!({
            "version": VERSION,
            "id": hex(&header.id),
            "size": header.size,
            "block_size": BLOCK,
            "data_start": header.data_start(),
            "depth": header.depth,
            "base": {
                "path": base.path,
                "format": if base.overlay.is_some() { "overlay" } else { "raw" },
                "id": base.overlay.as_ref().map(hex),
                "size": base.len,
                "modified_ns": base.modified_ns,
            },
        })
    };
    let layer = |layer: &LayerInfo| match &layer.header {
        Some(of) => json!({
            "path": layer.path,
            "format": "overlay",
            "blocks": layer.allocated,
            "header": header(of),
        }),
        None => json!({ "path": layer.path, "format": "raw" }),
    };
    json!({ "chain": described.layers.iter().map(layer).collect::<Vec<_>>() })
}

fn as_text(described: &Described) -> String {
    let mut table = Table::new(["FILE", "FORMAT", "SIZE", "WRITTEN", "OF", "ID"]);
    for layer in &described.layers {
        let path = layer.path.display().to_string();
        table.push(match &layer.header {
            Some(header) => [
                path,
                format!("overlay {VERSION}"),
                ByteSize(header.size).to_string(),
                ByteSize(layer.allocated * BLOCK).to_string(),
                format!("{} of {} blocks", layer.allocated, header.blocks()),
                hex(&header.id),
            ],
            None => {
                let size = described.layers.first().and_then(|top| top.header.as_ref());
                let size = size.map_or(0, |header| header.size);
                let dash = || "-".to_owned();
                [path, "raw".into(), ByteSize(size).to_string(), dash(), dash(), dash()]
            }
        });
    }
    table.to_string()
}
