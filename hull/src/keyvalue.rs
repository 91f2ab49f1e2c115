//! `key=value,key,…` options, read by serde into the same types as the configuration file.
//!
//! A key without a value is `true`. A comma in a value is written twice. Errors name the option's
//! position and the nearest known key.

use std::fmt;

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer};
use serde::de::{MapAccess, VariantAccess, Visitor};
use serde::forward_to_deserialize_any;

/// Why an option could not be read.
#[derive(Debug, PartialEq, Eq)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl serde::de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Error {
        Error(message.to_string())
    }
}

/// One `key` or `key=value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// What stands before the `=`.
    pub key: String,
    /// What stands behind it, if there is one.
    pub value: Option<String>,
}

/// Splits `text` at its single commas.
pub fn split(text: &str) -> Vec<Pair> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
        .into_iter()
        .filter(|part| !part.is_empty())
        .map(|part| match part.split_once('=') {
            Some((key, value)) => Pair { key: key.to_owned(), value: Some(value.to_owned()) },
            None => Pair { key: part, value: None },
        })
        .collect()
}

/// Reads `pairs` into a `T`.
///
/// # Errors
/// An unknown or repeated key, or a value that `T` does not take.
pub fn read<T: DeserializeOwned>(pairs: &[Pair]) -> Result<T, Error> {
    for (n, pair) in pairs.iter().enumerate() {
        if pairs[..n].iter().any(|other| other.key == pair.key) {
            return Err(Error(format!("key {:?} is given twice", pair.key)));
        }
    }
    T::deserialize(Options { pairs, current: None }).map_err(|Error(message)| {
        match suggestion(&message) {
            Some(nearest) => Error(format!("{message}; did you mean `{nearest}`?")),
            None => Error(message),
        }
    })
}

/// The known key nearest to the unknown one, from serde's own message ("unknown field `x`, expected
/// one of `a`, `b`").
pub fn suggestion(message: &str) -> Option<String> {
    let message = message.lines().find(|line| line.contains("unknown"))?;
    let mut quoted = message.split('`').skip(1).step_by(2);
    let unknown = quoted.next()?;
    quoted
        .map(|known| (strsim::damerau_levenshtein(unknown, known), known))
        .min()
        .filter(|&(distance, known)| distance <= known.len().max(unknown.len()).div_ceil(2))
        .map(|(_, known)| known.to_owned())
}

struct Options<'a> {
    pairs: &'a [Pair],
    current: Option<&'a Pair>,
}

impl<'de> Deserializer<'de> for Options<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de> MapAccess<'de> for Options<'_> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((pair, rest)) = self.pairs.split_first() else { return Ok(None) };
        self.pairs = rest;
        self.current = Some(pair);
        seed.deserialize(pair.key.as_str().into_deserializer()).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let Some(pair) = self.current.take() else {
            return Err(serde::de::Error::custom("a value without a key"));
        };
        seed.deserialize(Value(pair.value.as_deref()))
            .map_err(|Error(message)| Error(format!("{}: {message}", pair.key)))
    }
}

/// The text behind a `=`, read as whatever type is wanted.
struct Value<'a>(Option<&'a str>);

impl<'a> Value<'a> {
    fn text(&self) -> Result<&'a str, Error> {
        self.0.ok_or_else(|| Error("needs a value".into()))
    }
}

macro_rules! parse_numbers {
    ($($method:ident $visit:ident $type:ty),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            let text = self.text()?;
            let number: $type =
                text.parse().map_err(|err| Error(format!("{text:?} is not a number here: {err}")))?;
            visitor.$visit(number)
        }
    )*};
}

impl<'de> Deserializer<'de> for Value<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_str(self.text()?)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            None | Some("true" | "on" | "yes") => visitor.visit_bool(true),
            Some("false" | "off" | "no") => visitor.visit_bool(false),
            Some(other) => Err(Error(format!("{other:?} is neither on nor off"))),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(Variant(self.text()?))
    }

    parse_numbers! {
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64, deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16,
        deserialize_i32 visit_i32 i32, deserialize_i64 visit_i64 i64
    }

    forward_to_deserialize_any! {
        f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

struct Variant<'a>(&'a str);

impl<'de> EnumAccess<'de> for Variant<'_> {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        seed.deserialize(self.0.into_deserializer()).map(|value| (value, self))
    }
}

impl<'de> VariantAccess<'de> for Variant<'_> {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _seed: T) -> Result<T::Value, Error> {
        Err(Error(format!("{:?} takes no value", self.0)))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, _visitor: V) -> Result<V::Value, Error> {
        Err(Error(format!("{:?} takes no value", self.0)))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Error> {
        Err(Error(format!("{:?} takes no value", self.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmm::config::{CacheMode, DiskConfig, NetConfig};

    fn disk(text: &str) -> Result<DiskConfig, String> {
        read(&split(text)).map_err(|err| err.to_string())
    }

    #[test]
    fn keys_values_and_flags_are_read() {
        let disk = disk("path=/a,,b.img,ro,id=7,queues=2,cache=writethrough,direct=off").unwrap();
        assert_eq!(disk.path.to_str(), Some("/a,b.img"));
        assert_eq!((disk.ro, disk.direct, disk.queues), (true, false, Some(2)));
        assert_eq!(disk.id.as_deref(), Some("7"));
        assert_eq!(disk.cache, CacheMode::Writethrough);
        let net: NetConfig = read(&split("mac=06:00:00:00:00:01,mtu=9000")).unwrap();
        assert_eq!(net.mac.unwrap().to_string(), "06:00:00:00:00:01");
    }

    #[test]
    fn errors_name_the_key_and_the_nearest_one() {
        assert!(disk("pth=x").unwrap_err().ends_with("did you mean `path`?"));
        assert!(disk("path=x,queues=many").unwrap_err().starts_with("queues: \"many\""));
        assert!(disk("path=x,queues=70000").unwrap_err().starts_with("queues: "));
        assert!(disk("path").unwrap_err().contains("needs a value"));
        assert!(disk("path=x,ro=maybe").unwrap_err().starts_with("ro: "));
        assert!(disk("path=x,path=y").unwrap_err().contains("twice"));
        let err = disk("path=x,cache=writebak").unwrap_err();
        assert!(err.contains("did you mean `writeback`?"), "{err}");
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,40}") {
            let _ = disk(&text);
        }
    }
}
