//! Tables of requests, as text:
//!
//! ```text
//! # A remark.
//! ~ serial: /vm/config /serial: nothing → object
//! == name of a session
//! in fresh running
//! PUT /vsock {"guest_cid": 2, "uds_path": "$DIR/v"}
//!   ~ host-cid: status 204 → 400
//!   ~ host-cid [running]: …
//! ```
//!
//! A session is asked from its first line to its last, once in each of its states. A line that
//! begins with `~` lists a difference of the request above, in all states or in some; one in front of
//! all sessions is there at the beginning of each. `ENDS` waits
//! for the end of both processes, and compares their exit codes.

/// The states that a session can begin in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing is configured.
    Fresh,
    /// Each resource is.
    Configured,
    /// It runs.
    Running,
    /// It ran.
    Paused,
    /// Its start was refused, for want of a kernel.
    Failed,
}

impl State {
    pub const ALL: [State; 5] =
        [State::Fresh, State::Configured, State::Running, State::Paused, State::Failed];

    pub fn name(self) -> &'static str {
        match self {
            State::Fresh => "fresh",
            State::Configured => "configured",
            State::Running => "running",
            State::Paused => "paused",
            State::Failed => "failed",
        }
    }

    fn parse(name: &str) -> State {
        let found = State::ALL.into_iter().find(|state| state.name() == name);
        found.unwrap_or_else(|| panic!("there is no state {name:?}"))
    }
}

/// A difference that is known.
#[derive(Debug)]
pub struct Known {
    pub reason: String,
    pub states: Vec<State>,
    pub what: String,
}

#[derive(Debug)]
pub struct Request {
    pub line: usize,
    pub method: String,
    pub path: String,
    pub body: String,
    pub known: Vec<Known>,
}

impl Request {
    /// True if nothing is asked, but both are to end by themselves.
    pub fn is_the_end(&self) -> bool {
        self.method == "ENDS"
    }
}

#[derive(Debug)]
pub struct Session {
    pub name: String,
    pub states: Vec<State>,
    pub requests: Vec<Request>,
}

/// A table: the differences of machines of which nothing was asked yet, and the sessions.
#[derive(Debug, Default)]
pub struct Table {
    pub always: Vec<Known>,
    pub sessions: Vec<Session>,
}

impl Table {
    /// All differences that are listed.
    pub fn known(&self) -> impl Iterator<Item = &Known> {
        let requests = self.sessions.iter().flat_map(|session| &session.requests);
        self.always.iter().chain(requests.flat_map(|request| &request.known))
    }
}

/// Reads a table.
pub fn parse(text: &str) -> Table {
    let mut table = Table::default();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix("== ") {
            let name = name.to_owned();
            table.sessions.push(Session { name, states: vec![State::Fresh], requests: Vec::new() });
            continue;
        }
        let Some(session) = table.sessions.last_mut() else {
            let known = line.strip_prefix("~ ").expect("a session or a difference comes first");
            table.always.push(parse_known(known, &State::ALL));
            continue;
        };
        if let Some(states) = line.strip_prefix("in ") {
            session.states = states.split(' ').map(State::parse).collect();
        } else if let Some(known) = line.strip_prefix("~ ") {
            let request = session.requests.last_mut().expect("a request comes first");
            request.known.push(parse_known(known, &session.states));
        } else {
            let mut parts = line.splitn(3, ' ');
            let mut part = || parts.next().unwrap_or_default().to_owned();
            let (method, path, body) = (part(), part(), part());
            let request = Request { line: index + 1, method, path, body, known: Vec::new() };
            session.requests.push(request);
        }
    }
    table
}

fn parse_known(text: &str, all: &[State]) -> Known {
    let (head, what) = text.split_once(": ").unwrap_or_else(|| panic!("no colon in {text:?}"));
    let (reason, states) = match head.split_once(" [") {
        Some((reason, states)) => {
            let states = states.trim_end_matches(']').split(' ').map(State::parse).collect();
            (reason, states)
        }
        None => (head, all.to_vec()),
    };
    Known { reason: reason.to_owned(), states, what: what.to_owned() }
}

/// `name: sentence`, a line each; a sentence may go on, indented, on the next line.
pub fn reasons(text: &str) -> Vec<&str> {
    let mut names = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with([' ', '#'])) {
        let (name, sentence) = line.split_once(": ").expect("name: sentence");
        assert!(sentence.len() > 10, "{name} says nothing");
        assert!(!names.contains(&name), "{name} is there twice");
        names.push(name);
    }
    names
}
