//! Runs the tables.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::compare::{Measure, differences};
use crate::peer::{FIRECRACKER, Peer};
use crate::table::{self, Request, Session, State};

const REASONS: &str = include_str!("../../contract/reasons");

/// How long a machine that ends may take to.
const PATIENCE: Duration = Duration::from_secs(10);

/// Both, in the same state.
struct Pair {
    firecracker: Peer,
    hull: Peer,
    /// In what their machines differ already.
    apart: BTreeSet<String>,
}

impl Pair {
    fn start(state: State) -> Pair {
        let in_namespace = |command: fn() -> Command| {
            // It and its TAP stay, as long as the process is in there.
            testnet::in_namespace(false, || Ok(Peer::start(command(), state))).unwrap()
        };
        let firecracker = in_namespace(|| {
            let mut command = Command::new(&*FIRECRACKER);
            // Its own filter kills it when a request moves its heap in an unforeseen way.
            command.arg("--no-seccomp");
            command
        });
        let hull = in_namespace(|| {
            let mut command = Command::new(&*machine_tests::HULL);
            command.arg("firecracker");
            command
        });
        let mut pair = Pair { firecracker, hull, apart: BTreeSet::new() };
        pair.apart = pair.views_apart();
        pair
    }

    /// The differences that a request makes, in what the machine is only with `look`; and whether the
    /// session goes on.
    fn ask(&mut self, request: &Request, look: bool) -> (BTreeSet<String>, bool) {
        let mut found = BTreeSet::new();
        let (left, right) = if request.is_the_end() {
            (None, None)
        } else {
            let ask = |peer: &Peer| peer.ask(&request.method, &request.path, &request.body);
            (ask(&self.firecracker), ask(&self.hull))
        };
        let (Some(left), Some(right)) = (&left, &right) else {
            let end = |peer: &mut Peer, answered: bool| match answered {
                true => "answers".to_owned(),
                false => match peer.ends_within(PATIENCE) {
                    Some(code) => format!("ends with {code}"),
                    None => "goes on".to_owned(),
                },
            };
            let (left, right) =
                (end(&mut self.firecracker, left.is_some()), end(&mut self.hull, right.is_some()));
            if left != right {
                found.insert(format!("{left} → {right}"));
            }
            return (found, false);
        };
        if left.status == right.status {
            let json = |body: &str| serde_json::from_str(body).unwrap_or_else(|_| body.into());
            let bodies = (json(&left.body), json(&right.body));
            found.extend(
                differences(&bodies.0, &bodies.1, Measure::Shape)
                    .into_iter()
                    .map(|what| format!("body {what}")),
            );
        } else {
            found.insert(format!("status {} → {}", left.status, right.status));
            // Whatever the status is: what is refused says why.
            if right.status >= 400 && !right.json()["fault_message"].is_string() {
                found.insert(format!("no fault_message: {}", right.body));
            }
        }
        if !look {
            return (found, true);
        }
        let apart = self.views_apart();
        found.extend(apart.difference(&self.apart).map(|what| format!("after {what}")));
        self.apart = apart;
        (found, true)
    }

    fn views_apart(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for ((view, left), (_, right)) in
            self.firecracker.views().into_iter().zip(self.hull.views())
        {
            match (left, right) {
                (Some((left, left_body)), Some((right, right_body))) if left == right => {
                    // What the guest reports changes by itself.
                    let measure = match view {
                        "/balloon/statistics" => Measure::Shape,
                        _ => Measure::Values,
                    };
                    let bodies = differences(&left_body, &right_body, measure);
                    found.extend(bodies.into_iter().map(|what| format!("{view} {what}")));
                }
                (left, right) => {
                    let status = |answer: Option<(u16, _)>| match answer {
                        Some((status, _)) => status.to_string(),
                        None => "closed".to_owned(),
                    };
                    found.insert(format!("{view} {} → {}", status(left), status(right)));
                }
            }
        }
        found
    }
}

/// Runs a session in each of its states; the number of requests, and what is wrong.
fn run(session: &Session, always: &BTreeSet<String>) -> (usize, String) {
    let (mut requests, mut wrong) = (0, String::new());
    // By request and difference, so that what is the same in several states is said once.
    let mut unlisted: BTreeMap<(usize, String), Vec<&str>> = BTreeMap::new();
    let mut vanished = unlisted.clone();
    for &state in &session.states {
        let mut pair = Pair::start(state);
        let title = format!("{} ({})", session.name, state.name());
        for what in pair.apart.symmetric_difference(always) {
            let listed = if always.contains(what) { "not so any more" } else { "not listed" };
            writeln!(wrong, "{title}: {listed} at the beginning: {what}").unwrap();
        }
        for (index, request) in session.requests.iter().enumerate() {
            requests += 1;
            // What is about to end may be gone.
            let ends_next = session.requests.get(index + 1).is_some_and(Request::is_the_end);
            let (mut found, goes_on) = pair.ask(request, !ends_next);
            for known in request.known.iter().filter(|known| known.states.contains(&state)) {
                if !found.remove(&known.what) {
                    let at = (index, known.what.clone());
                    vanished.entry(at).or_default().push(state.name());
                }
            }
            for what in found {
                unlisted.entry((index, what)).or_default().push(state.name());
            }
            if !goes_on {
                let rest = session.requests.len() - index - 1;
                if rest > 0 {
                    writeln!(wrong, "{title}: {rest} requests are left at the end").unwrap();
                }
                break;
            }
        }
    }
    let mut tell = |list: BTreeMap<(usize, String), Vec<&str>>, what_is_so: &str| {
        for ((index, what), states) in list {
            let Request { line, method, path, body, .. } = &session.requests[index];
            let states = states.join(" ");
            writeln!(wrong, "{line}: {method} {path} {body}").unwrap();
            writeln!(wrong, "  {what_is_so} [{states}]: {what}").unwrap();
        }
    };
    tell(unlisted, "not listed");
    tell(vanished, "not so any more");
    (requests, wrong)
}

/// Runs a table of at least so many requests.
fn compare(table: &str, least: usize) {
    let reasons = table::reasons(REASONS);
    let (mut requests, mut wrong) = (0, String::new());
    let table = table::parse(table);
    for known in table.known() {
        assert!(reasons.contains(&known.reason.as_str()), "{}: not a reason", known.reason);
    }
    let always = table.always.iter().map(|known| known.what.clone()).collect();
    for session in &table.sessions {
        let started = Instant::now();
        let (more, complaints) = run(session, &always);
        println!("{}: {more} requests, {:?}", session.name, started.elapsed());
        requests += more;
        wrong += &complaints;
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(requests >= least, "{requests} requests, not {least}");
    println!("{requests} requests");
}

#[test]
fn each_resource_is_read_and_written_alike_in_each_state() {
    compare(include_str!("../../contract/states"), 1000);
}

#[test]
fn machines_live_alike() {
    compare(include_str!("../../contract/lives"), 50);
}

#[test]
fn each_reason_is_needed() {
    let tables = [include_str!("../../contract/states"), include_str!("../../contract/lives")];
    let tables = tables.map(table::parse);
    for reason in table::reasons(REASONS) {
        let needed =
            tables.iter().flat_map(table::Table::known).any(|known| known.reason == reason);
        assert!(needed, "nothing differs for the reason {reason:?}");
    }
}
