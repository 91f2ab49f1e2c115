//! Options of the commands that do something with the files of disks.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use vmm::devices::virtio::blk::overlay::BaseFormat;

const DISK_EXAMPLES: &str = "\
Examples:
  hull disk create web.ovl --base debian.img
  hull run --kernel vmlinux --disk debian.img,overlay=web.ovl,root
  hull disk commit web.ovl --output web.img";

// Options of `hull disk`.
#[derive(Debug, Args)]
#[command(after_help = DISK_EXAMPLES)]
pub struct DiskArgs {
    #[command(subcommand)]
    pub command: DiskCommand,
}

// What there is to be done with disks.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Make an overlay: a file that takes what is written, while its base is only read
    Create {
        /// The file that is made
        #[arg(value_name = "OVERLAY")]
        overlay: PathBuf,
        /// What it stands on
        #[arg(long, value_name = "FILE")]
        base: PathBuf,
        /// What the base is. It is not guessed: a guest can make its raw disk look like an overlay
        #[arg(long, value_name = "FORMAT")]
        base_format: Option<BaseFormatArg>,
    },
    /// Print what an overlay or a qcow2 image says of itself and of what it stands on
    Show {
        /// The overlay or the image
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Fold an overlay into its base, and remove it; or write a whole raw disk
    Commit {
        /// The overlay, which no machine uses
        #[arg(value_name = "OVERLAY")]
        overlay: PathBuf,
        /// Its base, to be sure: nothing is done if it is another
        #[arg(long, value_name = "BASE", conflicts_with = "output")]
        into: Option<PathBuf>,
        /// Leave both as they are, and write the disk to this file
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

/// `--base-format`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum BaseFormatArg {
    Raw,
    Overlay,
}

impl From<BaseFormatArg> for BaseFormat {
    fn from(format: BaseFormatArg) -> BaseFormat {
        match format {
            BaseFormatArg::Raw => BaseFormat::CertainlyRaw,
            BaseFormatArg::Overlay => BaseFormat::Overlay,
        }
    }
}
