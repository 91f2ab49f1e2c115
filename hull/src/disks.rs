//! `hull disk create|show|commit`: what is done with the files of disks, without a machine.

use std::path::{Path, PathBuf};

use serde_json::json;
use vmm::config::ByteSize;
use vmm::devices::virtio::blk::overlay::{
    self, BLOCK, BaseFormat, Described, Header, LayerInfo, Overlay, VERSION,
};
use vmm::devices::virtio::blk::qcow2;

use crate::cli::{DiskArgs, DiskCommand, Result};
use crate::exit::Code;
use crate::spinner::watched;
use crate::streams::{self, printable};
use crate::table::Table;

#[derive(Debug, thiserror::Error)]
#[error("{} is a qcow2 image, not an overlay: `{with}` does that with images", path.display())]
struct IsImage {
    path: PathBuf,
    with: &'static str,
}

/// Does something with the files of disks.
pub fn disk(args: &DiskArgs) -> Result {
    match &args.command {
        DiskCommand::Create { overlay, base, base_format } => {
            let format = base_format.map_or(BaseFormat::Raw, BaseFormat::from);
            overlay::create(overlay, base, format)?;
        }
        DiskCommand::Show { file, json } => show(file, *json)?,
        DiskCommand::Commit { overlay, output, .. }
            if qcow2::looks_like_qcow2(overlay).unwrap_or(false) =>
        {
            let with = if output.is_some() { "qemu-img convert -O raw" } else { "qemu-img commit" };
            return Err(IsImage { path: overlay.clone(), with }.into());
        }
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
    // Nothing is opened here that an image names.
    let is_image = qcow2::looks_like_qcow2(path).unwrap_or(false);
    let text = match (is_image, json) {
        (true, true) => pretty(&image_as_json(path, &qcow2::describe(path)?))?,
        (true, false) => image_as_text(path, &qcow2::describe(path)?),
        (false, true) => pretty(&as_json(&overlay::describe(path)?))?,
        (false, false) => as_text(&overlay::describe(path)?),
    };
    Ok(streams::print(&text)?)
}

fn pretty(value: &serde_json::Value) -> serde_json::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

fn image_as_json(path: &Path, described: &qcow2::Described) -> serde_json::Value {
    let header = &described.header;
    let found = described.found.as_ref().ok();
    let clusters = |count: fn(&qcow2::Found) -> u64| found.map(count);
    json!({
        "path": path,
        "format": "qcow2",
        "version": header.version,
        "size": header.size,
        "cluster_size": header.cluster_size(),
        "refcount_bits": 1_u32 << header.refcount_order,
        "file_size": described.file_len,
        "data_clusters": clusters(|found| found.data),
        "compressed_clusters": clusters(|found| found.compressed),
        "zero_clusters": clusters(|found| found.zeroes),
        "snapshots": header.snapshots,
        "encrypted": header.encryption != 0,
        "dirty": header.is_dirty(),
        "corrupt": header.is_corrupt(),
        "backing": header.backing.as_ref().map(|backing| json!({
            "path": backing.name,
            "format": backing.format,
        })),
        "data_file": header.data_file,
        "problem": described.found.as_ref().err(),
    })
}

fn image_as_text(path: &Path, described: &qcow2::Described) -> String {
    let header = &described.header;
    let cluster = header.cluster_size();
    let mut lines = vec![
        ("file", path.display().to_string()),
        ("format", format!("qcow2, version {}", header.version)),
        ("size", ByteSize(header.size).to_string()),
        ("cluster", ByteSize(cluster).to_string()),
    ];
    if let Ok(found) = &described.found {
        let all = header.size.div_ceil(cluster);
        let compressed = match found.compressed {
            0 => String::new(),
            count => format!(", {count} of them compressed"),
        };
        lines.push(("written", format!("{} of {all} clusters{compressed}", found.data)));
    }
    if let Some(backing) = &header.backing {
        // What an image has as a name is quoted: it could have the end of a line in it.
        let format = match &backing.format {
            Some(format) => format!("format {format:?}"),
            None => "whose format it does not say".to_owned(),
        };
        lines.push(("stands on", format!("{:?}, {format}", backing.name)));
    }
    if header.snapshots > 0 {
        lines.push(("snapshots", header.snapshots.to_string()));
    }
    let flags: Vec<&str> = [(header.is_dirty(), "dirty"), (header.is_corrupt(), "corrupt")]
        .into_iter()
        .filter_map(|(is_set, name)| is_set.then_some(name))
        .collect();
    if !flags.is_empty() {
        lines.push(("marked", flags.join(", ")));
    }
    if let Err(problem) = &described.found {
        lines.push(("problem", problem.clone()));
    }
    lines.iter().map(|(name, value)| format!("{name:<10} {}\n", printable(value))).collect()
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
