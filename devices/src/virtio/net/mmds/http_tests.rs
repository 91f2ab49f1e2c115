use std::net::Ipv4Addr;

use proptest::prelude::*;
use serde_json::json;

use super::super::TokenKey;
use super::*;

fn options(version: Version) -> Options {
    let key = TokenKey::random().unwrap();
    Options { version, address: Ipv4Addr::new(169, 254, 169, 254), imds_compat: false, key }
}

fn contents() -> Value {
    json!({
        "age": 43,
        "name": { "first": "John", "second": "Doe" },
        "phones": ["+40", "+44"],
        "a/b": { "~": "tilde" },
        "none": null,
    })
}

/// The answer's status, head and body.
fn parts(answer: &Answer) -> (u16, String, String) {
    let text = String::from_utf8(answer.bytes.clone()).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let len = format!("Content-Length: {}", body.len());
    assert!(head.lines().any(|line| line == len), "{head}");
    (status, head.to_owned(), body.to_owned())
}

fn ask(options: &Options, request: &str) -> (u16, String, String) {
    let answer = answer(options, &contents(), Instant::now(), 1, request.as_bytes()).unwrap();
    assert!(answer.close || answer.consumed == request.len());
    parts(&answer)
}

fn get(options: &Options, path: &str, headers: &str) -> (u16, String) {
    let (status, _, body) = ask(options, &format!("GET {path} HTTP/1.1\r\n{headers}\r\n"));
    (status, body)
}

const JSON: &str = "Accept: application/json\r\n";

#[test]
fn values_are_json_or_lists() {
    let v1 = options(Version::V1);
    let found = |path: &str, headers: &str| get(&v1, path, headers);
    let ok = |body: &str| (200, body.to_owned());
    assert_eq!(found("/", ""), ok("a/b/\nage\nname/\nnone\nphones"));
    assert_eq!(found("/name", ""), ok("first\nsecond"));
    assert_eq!(found("//name///first//", ""), ok("John"));
    assert_eq!(found("/name/first", JSON), ok("\"John\""));
    assert_eq!(found("/name/", JSON), ok(r#"{"first":"John","second":"Doe"}"#));
    assert_eq!(found("/phones/1", ""), ok("+44"));
    assert_eq!(found("/age", JSON), ok("43"));
    assert_eq!(found("/none", JSON), ok("null"));
    assert_eq!(found("/a~1b/~0", ""), ok("tilde"));
    assert_eq!(found("http://169.254.169.254/name/second", ""), ok("Doe"));
    let unsupported = "Cannot retrieve value. The value has an unsupported type.".to_owned();
    for path in ["/age", "/phones", "/none"] {
        assert_eq!(found(path, ""), (501, unsupported.clone()));
    }
    assert_eq!(found("/name?x", ""), (404, "Resource not found: /name?x.".to_owned()));
    assert_eq!(found("/nmae", ""), (404, "Resource not found: /nmae.".to_owned()));
    assert_eq!(found("http://host", ""), (400, "Invalid URI.".to_owned()));
    assert_eq!(found("*", ""), (400, "Invalid URI.".to_owned()));
}

#[test]
fn types_are_chosen_by_the_first_one_known() {
    let v1 = options(Version::V1);
    let json = |accept: &str| {
        let request = format!("GET /name/first HTTP/1.1\r\n{accept}\r\n");
        let (_, head, body) = ask(&v1, &request);
        let kind = if body == "John" { "text/plain" } else { "application/json" };
        assert!(head.contains(&format!("Content-Type: {kind}")), "{head}");
        kind == "application/json"
    };
    assert!(
        json("accept: Application/JSON;q=1\r\n") && json("Accept: image/png, application/json\r\n")
    );
    for text in [
        "",
        "Accept: */*\r\n",
        "Accept: text/plain\r\n",
        "Accept: text/plain, application/json\r\n",
    ] {
        assert!(!json(text), "{text}");
    }
    let compatible = Options { imds_compat: true, ..options(Version::V1) };
    assert_eq!(get(&compatible, "/name/first", JSON).1, "John");
}

#[test]
fn version_2_wants_a_token() {
    let v2 = options(Version::V2);
    let (status, body) = get(&v2, "/age", JSON);
    assert_eq!(status, 401);
    assert!(body.starts_with("No MMDS token provided."), "{body}");
    let not_valid = (401, "MMDS token not valid.".to_owned());
    assert_eq!(get(&v2, "/age", "X-metadata-token: 00\r\n"), not_valid);
    for ttl in ["X-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds"] {
        let request = format!("PUT //latest/api/token HTTP/1.1\r\n{ttl}: 21600\r\n\r\n");
        let (status, head, token) = ask(&v2, &request);
        assert_eq!(status, 200, "{token}");
        assert!(head.contains("Content-Type: text/plain"), "{head}");
        assert!(head.contains("X-metadata-token-ttl-seconds: 21600"), "{head}");
        for name in ["x-metadata-TOKEN", "X-aws-ec2-metadata-token"] {
            let header = format!("{name}: {token}\r\n{JSON}");
            assert_eq!(get(&v2, "/age", &header), (200, "43".to_owned()));
            // A token is its machine's.
            assert_eq!(get(&options(Version::V2), "/age", &header), not_valid);
        }
        let header = format!("X-metadata-token: {token}\r\n{JSON}");
        let later = Instant::now() + Duration::from_secs(21_600);
        let request = format!("GET /age HTTP/1.1\r\n{header}\r\n");
        let late = answer(&v2, &contents(), later, 1, request.as_bytes()).unwrap();
        assert_eq!(parts(&late).0, 401);
    }
}

#[test]
fn tokens_are_refused_with_a_reason() {
    let options = options(Version::V2);
    let put = |path: &str, headers: &str| {
        let (status, _, body) = ask(&options, &format!("PUT {path} HTTP/1.1\r\n{headers}\r\n"));
        (status, body)
    };
    let path = "/latest/api/token";
    for ttl in ["0", "21601"] {
        let (status, body) = put(path, &format!("X-metadata-token-ttl-seconds: {ttl}\r\n"));
        assert_eq!(status, 400);
        assert!(body.ends_with("Please provide a value between 1 and 21600."), "{body}");
    }
    for ttl in ["-1", "+1", "", "1.5", "one", "99999999999"] {
        let (status, body) = put(path, &format!("X-metadata-token-ttl-seconds: {ttl}\r\n"));
        assert_eq!(status, 400);
        assert!(body.ends_with(&format!("Value:{ttl}")), "{body}");
    }
    assert_eq!(put(path, "").0, 400);
    let ttl = "X-metadata-token-ttl-seconds: 1\r\n";
    let forwarded = put(path, &format!("{ttl}x-forwarded-FOR: 1.2.3.4\r\n"));
    assert_eq!(forwarded.0, 400);
    assert!(forwarded.1.contains("X-Forwarded-For"), "{forwarded:?}");
    for path in ["/latest/api", "/latest/api/token/"] {
        assert_eq!(put(path, ttl), (404, format!("Resource not found: {path}.")));
    }
    assert_eq!(put(path, ttl).0, 200);
}

#[test]
fn other_methods_are_told_what_is_allowed() {
    for (version, allowed) in [(Version::V1, "Allow: GET"), (Version::V2, "Allow: GET, PUT")] {
        for method in ["POST", "PATCH", "DELETE", "HEAD", "PUT"] {
            if method == "PUT" && version == Version::V2 {
                continue;
            }
            let request = format!("{method} /latest/api/token HTTP/1.1\r\n\r\n");
            let (status, head, body) = ask(&options(version), &request);
            assert_eq!((status, body.as_str()), (405, "Not allowed HTTP method."));
            assert!(head.lines().any(|line| line == allowed), "{head}");
            assert_eq!(head.contains("Connection: close"), method == "HEAD");
        }
    }
}

#[test]
fn requests_may_come_in_pieces_and_in_a_row() {
    let v1 = options(Version::V1);
    let request = "PUT / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
    let tried = |received: &[u8]| answer(&v1, &contents(), Instant::now(), 1, received);
    for cut in 0..request.len() {
        assert!(tried(&request.as_bytes()[..cut]).is_none(), "{cut}");
    }
    let two = format!("{request}GET / HTTP/1.0\r\n\r\n");
    let first = tried(two.as_bytes()).unwrap();
    assert_eq!((first.consumed, first.close), (request.len(), false));
    let second = tried(&two.as_bytes()[first.consumed..]).unwrap();
    assert!(second.close, "HTTP/1.0 ends a connection");
    assert!(second.bytes.starts_with(b"HTTP/1.0 200 OK\r\n"));
    assert!(tried(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap().close);
    assert!(!tried(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").unwrap().close);
}

#[test]
fn what_cannot_be_read_ends_the_connection() {
    let v1 = options(Version::V1);
    let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(LONGEST));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(HEADERS + 1));
    for (request, expected) in [
        ("\0\0\0\0", 400),
        ("GET / HTTP/2.0\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        ("PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        ("PUT / HTTP/1.1\r\nContent-Length: 4096\r\n\r\n", 413),
        ("PUT / HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n", 413),
        ("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (&long, 413),
        (&many, 400),
    ] {
        let answer = answer(&v1, &contents(), Instant::now(), 1, request.as_bytes()).unwrap();
        assert!(answer.close && answer.consumed == 0);
        assert_eq!(parts(&answer).0, expected, "{request:.40}");
    }
}

proptest! {
    #[test]
    fn nothing_that_comes_breaks_it(
        start in "(GET|PUT|POST) [/a-z~0-1*]{0,12} HTTP/1.[01]\r\n",
        headers in proptest::collection::vec("[A-Za-z-]{1,20}: .{0,20}\r\n", 0..5),
        noise in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let (v2, contents) = (options(Version::V2), contents());
        for request in [[start.as_bytes(), headers.concat().as_bytes(), b"\r\n", &noise].concat(), noise] {
            if let Some(answer) = answer(&v2, &contents, Instant::now(), 1, &request) {
                prop_assert!(answer.consumed <= request.len());
                prop_assert!(answer.consumed > 0 || answer.close);
                let (status, ..) = parts(&answer);
                prop_assert!((200..=501).contains(&status));
            }
        }
    }
}
