//! In what two answers differ.

use serde_json::{Map, Value};

/// How closely bodies are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Keys, and the types of what is behind them.
    Shape,
    /// All of it.
    Values,
}

/// The differences of two JSON documents, each as `POINTER: LEFT → RIGHT`.
pub fn differences(left: &Value, right: &Value, measure: Measure) -> Vec<String> {
    let mut found = Vec::new();
    walk("", Some(left), Some(right), measure, &mut found);
    found
}

fn walk(
    at: &str,
    left: Option<&Value>,
    right: Option<&Value>,
    measure: Measure,
    found: &mut Vec<String>,
) {
    match (left, right) {
        (Some(Value::Object(left)), Some(Value::Object(right))) => {
            for key in keys(left, right) {
                walk(&format!("{at}/{key}"), left.get(key), right.get(key), measure, found);
            }
        }
        (Some(Value::Array(left)), Some(Value::Array(right))) => {
            for index in 0..left.len().max(right.len()) {
                walk(&format!("{at}/{index}"), left.get(index), right.get(index), measure, found);
            }
        }
        (left, right) if measure == Measure::Values && left == right => {}
        (left, right) => {
            let (left, right) = (describe(left, measure), describe(right, measure));
            if measure == Measure::Values || left != right {
                let at = if at.is_empty() { "/" } else { at };
                found.push(format!("{at}: {left} → {right}"));
            }
        }
    }
}

fn keys<'a>(left: &'a Map<String, Value>, right: &'a Map<String, Value>) -> Vec<&'a String> {
    let more = right.keys().filter(|key| !left.contains_key(*key));
    left.keys().chain(more).collect()
}

/// Longer text is shown by its beginning.
const SHOWN: usize = 60;

fn describe(value: Option<&Value>, measure: Measure) -> String {
    match (value, measure) {
        (None, _) => "nothing".to_owned(),
        (Some(Value::Array(_)), _) => "array".to_owned(),
        (Some(Value::Object(_)), _) => "object".to_owned(),
        (Some(Value::String(text)), Measure::Values) if text.len() > SHOWN => {
            let start: String = text.chars().take(8).collect();
            format!("{start:?}… of {} bytes", text.len())
        }
        (Some(value), Measure::Values) => value.to_string(),
        (Some(Value::Null), _) => "null".to_owned(),
        (Some(Value::Bool(_)), _) => "boolean".to_owned(),
        (Some(Value::Number(_)), _) => "number".to_owned(),
        (Some(Value::String(_)), _) => "string".to_owned(),
    }
}

#[test]
fn each_difference_is_found() {
    let left = serde_json::json!({ "a": 1, "b": [1, "x"], "c": { "d": null }, "e": 1 });
    let right = serde_json::json!({ "a": 1, "b": [2, "y", 3], "c": { "d": 1 }, "f": 1 });
    let values = [
        "/b/0: 1 → 2",
        "/b/1: \"x\" → \"y\"",
        "/b/2: nothing → 3",
        "/c/d: null → 1",
        "/e: 1 → nothing",
    ];
    let mut expected = values.to_vec();
    expected.push("/f: nothing → 1");
    assert_eq!(differences(&left, &right, Measure::Values), expected);
    let shape = ["/b/2: nothing → number", "/c/d: null → number"];
    assert_eq!(differences(&left, &right, Measure::Shape)[..2], shape);
    assert!(differences(&left, &left, Measure::Values).is_empty());
}
