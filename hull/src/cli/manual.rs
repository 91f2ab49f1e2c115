//! Shell completions and the manual page, both made from the command line's own description.

use std::io::{self, Write};

use clap::{Args, CommandFactory};

use super::{Cli, Result};
use crate::exit::Code;
use crate::streams;

// Options of `hull completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Shell to complete in
    pub shell: clap_complete::Shell,
}

/// Prints completions for a shell.
pub fn completions(args: &CompletionsArgs) -> Result {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "hull", &mut script);
    streams::print(&String::from_utf8(script)?)?;
    Ok(Code::SUCCESS)
}

/// Prints the manual page: one for the command and all its subcommands.
pub fn man() -> Result {
    let mut page = Vec::new();
    write_man(&mut page)?;
    streams::print(&String::from_utf8(page)?)?;
    Ok(Code::SUCCESS)
}

fn write_man(page: &mut Vec<u8>) -> io::Result<()> {
    let command = Cli::command();
    let man = clap_mangen::Man::new(command.clone());
    man.render_title(page)?;
    write_sections(page, ".SH", |page| man.render_name_section(page))?;
    writeln!(page, ".SH SYNOPSIS\n\\fBhull\\fR \\fIsubcommand\\fR [\\fIoptions\\fR]")?;
    write_sections(page, ".SH", |page| man.render_options_section(page))?;
    for subcommand in command.get_subcommands() {
        let name = format!("hull {}", subcommand.get_name());
        writeln!(page, ".SH {name:?}")?;
        let man = clap_mangen::Man::new(subcommand.clone().bin_name(name));
        write_sections(page, ".SS", |page| {
            man.render_synopsis_section(page)?;
            man.render_description_section(page)?;
            man.render_options_section(page)?;
            match subcommand.get_after_help() {
                Some(_) => man.render_extra_section(page),
                None => Ok(()),
            }
        })?;
    }
    page.extend(EXIT_STATUS.as_bytes());
    write_sections(page, ".SH", |page| man.render_version_section(page))
}

/// Appends rendered sections under headings of the kind `heading`. The renderer takes each for a
/// page, and defines the apostrophe anew in front.
fn write_sections(
    page: &mut Vec<u8>,
    heading: &str,
    render: impl FnOnce(&mut Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    let mut sections = Vec::new();
    render(&mut sections)?;
    for line in sections.split_inclusive(|&byte| byte == b'\n') {
        if line.starts_with(b".ie ") || line.starts_with(b".el ") {
            continue;
        }
        match line.strip_prefix(b".SH") {
            Some(title) => page.extend([heading.as_bytes(), title].concat()),
            None => page.extend(line),
        }
    }
    Ok(())
}

const EXIT_STATUS: &str = r#".SH "EXIT STATUS"
.TP
0
The guest powered off or reset itself, or the user ended it.
.TP
1
The monitor or its host failed, or no machine has this name.
.TP
2
The options or the configuration are not valid.
.TP
3
The guest crashed by a triple fault.
.TP
128+\fIN\fR
Signal \fIN\fR ended the machine.
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual_is_one_page() {
        let mut page = Vec::new();
        write_man(&mut page).unwrap();
        let page = String::from_utf8(page).unwrap();
        let lines = |start: &str| page.lines().filter(|line| line.starts_with(start)).count();
        assert_eq!(
            (lines(".TH "), lines(".SH \"hull run\""), lines(".SH \"hull stop\"")),
            (1, 1, 1)
        );
        // Pages of subcommands, which there are none of.
        assert!(!page.contains(r"hull\-"), "{page}");
        // What each does is said above its options.
        assert!(!page.contains("Options of `"), "{page}");
        assert!(page.contains("Show how a machine is configured"), "{page}");
        assert!(page.contains(r"\fBhull run\fR") && page.contains(r"\-\-on\-reboot"), "{page}");
    }
}
