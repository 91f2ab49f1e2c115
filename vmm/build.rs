//! Compiles the seccomp policies in `resources/seccomp` into filter programs.
//!
//! A policy is text: one system call a line, optionally with a condition on one argument
//! (`ioctl if arg1 == 0xae80`), `#` starts a comment. Several lines for one call are alternatives.
//! Each policy becomes two programs: one that traps what is not listed, one that only logs it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs, io};

use seccompiler::{BpfMap, TargetArch, compile_from_json};

const POLICIES: [&str; 4] = ["main", "vcpu", "io", "pool"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../resources/seccomp");
    let out = env::var("OUT_DIR")?;
    let arch = TargetArch::try_from(env::var("CARGO_CFG_TARGET_ARCH")?.as_str())?;
    for name in POLICIES {
        let path = directory.join(format!("{name}.policy"));
        println!("cargo::rerun-if-changed={}", path.display());
        let text = fs::read_to_string(&path)
            .map_err(|err| io::Error::other(format!("{}: {err}", path.display())))?;
        let rules = parse(&text).map_err(|err| format!("{}: {err}", path.display()))?;
        for action in ["trap", "log"] {
            let json = format!(
                r#"{{"{name}": {{"mismatch_action": "{action}", "match_action": "allow",
                    "filter": [{rules}]}}}}"#
            );
            let mut programs: BpfMap = compile_from_json(json.as_bytes(), arch)
                .map_err(|err| format!("{}: {err}", path.display()))?;
            let program = programs.remove(name).ok_or("the compiler returned no program")?;
            let bytes: Vec<u8> = program
                .iter()
                .flat_map(|op| {
                    let [a, b] = op.code.to_ne_bytes();
                    let [e, f, g, h] = op.k.to_ne_bytes();
                    [a, b, op.jt, op.jf, e, f, g, h]
                })
                .collect();
            fs::write(Path::new(&out).join(format!("{name}.{action}.bpf")), bytes)?;
        }
    }
    Ok(())
}

/// Turns a policy into the rules of seccompiler's JSON.
fn parse(text: &str) -> Result<String, String> {
    let mut calls: BTreeMap<&str, Vec<Option<(u8, u64)>>> = BTreeMap::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let wrong = || format!("line {number}: expected `CALL` or `CALL if argN == VALUE`");
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [call] => calls.entry(call).or_default().push(None),
            [call, "if", arg, "==", value] => {
                let index = arg.strip_prefix("arg").and_then(|n| n.parse().ok());
                let value = match value.strip_prefix("0x") {
                    Some(hex) => u64::from_str_radix(hex, 16).ok(),
                    None => value.parse().ok(),
                };
                let condition = index.zip(value).ok_or_else(wrong)?;
                calls.entry(call).or_default().push(Some(condition));
            }
            _ => return Err(wrong()),
        }
    }
    let mut rules = String::new();
    for (call, conditions) in calls {
        if conditions.len() > 1 && conditions.contains(&None) {
            return Err(format!("{call} is allowed both always and under a condition"));
        }
        for condition in conditions {
            let separator = if rules.is_empty() { "" } else { "," };
            let args = condition.map_or(String::new(), |(index, value)| {
                format!(
                    r#", "args": [{{"index": {index}, "type": "dword", "op": "eq", "val": {value}}}]"#
                )
            });
            write!(rules, r#"{separator}{{"syscall": "{call}"{args}}}"#)
                .map_err(|err| err.to_string())?;
        }
    }
    Ok(rules)
}
