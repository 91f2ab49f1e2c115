//! The CPUs that a guest is shown.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use arch::template::{StaticTemplate, Template};
use serde::{Deserialize, Serialize};

use super::{ConfigError, error};

/// Largest file of a CPU template, in bytes.
const LARGEST_FILE: u64 = 1 << 20;

/// What the guest's CPUs have of the host's. Without a template that is all that a guest can use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct CpuConfig {
    /// Two vCPUs are the threads of a core: their number is even, or 1.
    pub smt: bool,
    /// The CPU of a family of EC2 instances, by its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<StaticTemplate>,
    /// File with a CPU template of the user's own, in JSON, at most 1 MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,
    /// Such a template itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modifiers: Option<Template>,
}

impl CpuConfig {
    /// Checks it for a machine of so many vCPUs.
    pub(super) fn validate(&self, cpus: u32) -> Result<(), ConfigError> {
        if self.smt && cpus > 1 && !cpus.is_multiple_of(2) {
            return error("cpus", format!("{cpus} is odd; with smt it has to be 1 or even"));
        }
        let given = [
            ("cpu.template", self.template.is_some()),
            ("cpu.config", self.config.is_some()),
            ("cpu.modifiers", self.modifiers.is_some()),
        ];
        let mut given = given.into_iter().filter(|(_, is)| *is).map(|(key, _)| key);
        match (given.next(), given.next()) {
            (Some(first), Some(second)) => {
                error(second, format!("cannot be given together with {first}"))
            }
            _ => Ok(()),
        }
    }

    /// Has this template, in the place of any other.
    pub fn set_template(&mut self, template: Option<StaticTemplate>) {
        *self = CpuConfig { smt: self.smt, template, ..CpuConfig::default() };
    }

    /// Has this template of the user's own, in the place of any other.
    pub fn set_modifiers(&mut self, template: Template) {
        *self = CpuConfig { smt: self.smt, modifiers: Some(template), ..CpuConfig::default() };
    }

    /// The user's own template, read from its file if it is in one. It takes as long as the file does.
    ///
    /// # Errors
    /// The file cannot be read, or is none of a template.
    pub fn own_template(&self) -> Result<Option<Template>, ConfigError> {
        let Some(path) = &self.config else { return Ok(self.modifiers.clone()) };
        let at = |problem: String| ConfigError {
            field: "cpu.config".to_owned(),
            problem: format!("{}: {problem}", path.display()),
        };
        let bytes = read(path).map_err(|err| at(err.to_string()))?;
        let template = serde_json::from_slice(&bytes).map_err(|err| at(err.to_string()))?;
        Ok(Some(template))
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Of a pipe, nobody waits for the other end.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let mut bytes = Vec::new();
    file.take(LARGEST_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(io::Error::other("is larger than the 1 MiB that a CPU template may have"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(contents: &[u8]) -> (tempfile::TempDir, CpuConfig) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("template.json");
        std::fs::write(&path, contents).unwrap();
        (folder, CpuConfig { config: Some(path), ..CpuConfig::default() })
    }

    #[test]
    fn a_template_is_read_from_its_file() {
        let text = br#"{ "msr_modifiers": [{ "addr": "0x10a", "bitmap": "0b1x" }] }"#;
        let (_folder, cpu) = file(text);
        let template = cpu.own_template().unwrap().unwrap();
        assert_eq!(template.msrs(), [0x10A]);
        let inline = CpuConfig { modifiers: Some(template.clone()), ..CpuConfig::default() };
        assert_eq!(inline.own_template(), Ok(Some(template)));
        assert_eq!(CpuConfig::default().own_template(), Ok(None));
    }

    #[test]
    fn a_file_that_is_no_template_is_refused_by_name_and_place() {
        let refused = |cpu: &CpuConfig| cpu.own_template().unwrap_err().to_string();
        let wrong = b"{\n\"msr_modifiers\": [{ \"addr\": \"q\", \"bitmap\": \"0b1x\" }] }";
        let (_folder, cpu) = file(wrong);
        let message = refused(&cpu);
        for part in ["cpu.config: ", "template.json", "\"q\"", "line 2"] {
            assert!(message.contains(part), "{part}: {message}");
        }
        let (_folder, cpu) = file(&vec![b' '; (1 << 20) + 1]);
        assert!(refused(&cpu).contains("1 MiB"), "{}", refused(&cpu));
        let cpu = CpuConfig { config: Some("/dev/zero".into()), ..CpuConfig::default() };
        assert!(refused(&cpu).contains("1 MiB"));
        let cpu = CpuConfig { config: Some("/nowhere".into()), ..CpuConfig::default() };
        assert!(refused(&cpu).contains("/nowhere: No such file"), "{}", refused(&cpu));
    }

    #[test]
    fn a_cpu_is_described_in_one_way() {
        let check = |cpu: &CpuConfig, cpus| cpu.validate(cpus).map_err(|err| err.to_string());
        let mut cpu = CpuConfig { template: Some(StaticTemplate::T2), ..CpuConfig::default() };
        assert_eq!(check(&cpu, 3), Ok(()));
        cpu.modifiers = Some(Template::default());
        assert_eq!(
            check(&cpu, 1).unwrap_err(),
            "cpu.modifiers: cannot be given together with cpu.template"
        );
        cpu.smt = true;
        cpu.set_modifiers(Template::default());
        assert_eq!((check(&cpu, 2), cpu.template, cpu.smt), (Ok(()), None, true));
        cpu.set_template(Some(StaticTemplate::C3));
        assert_eq!((check(&cpu, 2), &cpu.modifiers, cpu.smt), (Ok(()), &None, true));
        let smt = CpuConfig { smt: true, ..CpuConfig::default() };
        for (cpus, fits) in [(1, true), (2, true), (3, false), (63, false), (64, true)] {
            assert_eq!(check(&smt, cpus).is_ok(), fits, "{cpus}");
        }
        assert!(check(&smt, 3).unwrap_err().contains("3 is odd"));
    }
}
