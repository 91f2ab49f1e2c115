//! Compiles the seccomp policies in `resources/seccomp` into filter programs: one that traps what
//! is not listed, one that only logs it.

#[path = "src/seccomp/policy.rs"]
mod policy;

use std::path::Path;
use std::{env, fs};

use policy::Policy;

/// Names of programs, and the policies that each of them is made from.
const PROGRAMS: [(&str, &[&str]); 7] = [
    ("main", &["main"]),
    ("main-api", &["main", "api", "starter"]),
    ("vcpu", &["vcpu"]),
    ("io", &["io"]),
    ("io-sockets", &["io", "sockets"]),
    ("pool", &["pool"]),
    ("api", &["api"]),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../resources/seccomp");
    let out = env::var("OUT_DIR")?;
    for (name, parts) in PROGRAMS {
        let mut policy = Policy::default();
        for part in parts {
            let path = directory.join(format!("{part}.policy"));
            println!("cargo::rerun-if-changed={}", path.display());
            let wrong = |what: String| format!("{}: {what}", path.display());
            let text = fs::read_to_string(&path).map_err(|err| wrong(err.to_string()))?;
            policy.join(Policy::parse(&text).map_err(wrong)?);
        }
        for (action, answer) in [("trap", policy::TRAP), ("log", policy::LOG)] {
            let program = policy.compile(answer).map_err(|err| format!("{name}: {err}"))?;
            let bytes: Vec<u8> = program
                .iter()
                .flat_map(|&(code, yes, no, k)| {
                    let ([a, b], [e, f, g, h]) = (code.to_ne_bytes(), k.to_ne_bytes());
                    [a, b, yes, no, e, f, g, h]
                })
                .collect();
            fs::write(Path::new(&out).join(format!("{name}.{action}.bpf")), bytes)?;
        }
    }
    Ok(())
}
