//! The metadata service as a stock protocol stack reaches it, with all that it leaves to the device.

use super::{Case, check};
use crate::guest::{Failure, Machine};
use crate::site::Site;

pub const CASES: &[(&str, Case)] = &[("metadata::is_read_by_a_stock_client", stock_client)];

/// A value that takes many segments.
const LONG: usize = 40_000;

/// Both forms of the contents, short and long, one connection each and several at once.
fn stock_client(site: &Site) -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let contents = folder.path().join("metadata.json");
    let long = "0123456789".repeat(LONG / 10);
    std::fs::write(&contents, format!(r#"{{"meta-data": {{"id": "i-1", "long": "{long}"}}}}"#))?;
    let network = site.network();
    let mut guest = Machine::new(site)?
        .option("--net", network.option(""))
        .option("--mmds", contents)
        .cmdline(network.cmdline())
        .boot()?;
    guest.run("ip route add 169.254.169.254 dev eth0")?;
    // busybox's wget looks names up in a way that a static program cannot.
    let ask = |path: &str| {
        let request = format!("GET /meta-data/{path} HTTP/1.0\\r\\n\\r\\n");
        format!("printf '{request}' | nc -w 20 169.254.169.254 80")
    };
    let get = |path: &str| format!("{} | sed '1,/^.$/d'", ask(path));
    guest.expect(&get("id"), "i-1")?;
    guest.expect(&format!("{} | wc -c", get("long")), &LONG.to_string())?;
    guest.expect(&format!("{} | tr -d 0-9 | wc -c", get("long")), "0")?;
    guest.run(&format!("{} | grep -q '^HTTP/1.0 404 '", ask("missing")))?;
    let at_once = format!("for n in 1 2 3 4 5 6 7 8; do {} >/tmp/$n & done; wait", get("long"));
    guest.run(&at_once)?;
    guest.expect("cat /tmp/[1-8] | wc -c", &(8 * LONG).to_string())?;
    // Other ports are closed, and nobody else is at this address.
    let (status, _) = guest.attempt("nc -w 5 169.254.169.254 81 </dev/null")?;
    check(status != 0, || "port 81 is open".into())?;
    guest.power_off()
}
