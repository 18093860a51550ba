//! A JSON object read field by field, so that every refusal names the field, what was expected and what is there.

use serde_json::{Map, Value};

pub(super) type Parsed<T> = std::result::Result<T, String>;

/// A JSON object; `null` counts as absent. Messages name the field.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    pub map: &'a Map<String, Value>,
    pub prefix: &'static str,
}

impl<'a> Fields<'a> {
    pub fn get<T>(self, name: &str, expected: &str, convert: impl FnOnce(&'a Value) -> Option<T>) -> Parsed<Option<T>> {
        match self.map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| self.wrong(name, expected, value)),
        }
    }
    /// True of a field that is there, `null` or not.
    pub fn states(self, name: &str) -> bool {
        self.map.contains_key(name)
    }
    /// True of a field that has a value.
    pub fn has(self, name: &str) -> bool {
        self.map.get(name).is_some_and(|v| !v.is_null())
    }
    pub fn wrong(self, name: &str, expected: &str, got: &Value) -> String {
        let mut got = got.to_string();
        if let Some((cut, _)) = got.char_indices().nth(80) {
            got.replace_range(cut.., "…");
        }
        format!("{}{name}: expected {expected}, got {got}", self.prefix)
    }
    /// [`Fields::wrong`] about the value that is there.
    pub fn unknown(self, name: &str, expected: &str) -> String {
        self.wrong(name, expected, self.map.get(name).unwrap_or(&Value::Null))
    }
    pub fn missing(self, name: &str) -> String {
        format!("{}{name}: a needed field is missing", self.prefix)
    }
    pub fn size(self, name: &str) -> Parsed<Option<usize>> {
        self.get(name, "a whole number", |v| usize::try_from(v.as_u64()?).ok())
    }
    pub fn need_size(self, name: &str) -> Parsed<usize> {
        self.size(name)?.ok_or_else(|| self.missing(name))
    }
    pub fn number(self, name: &str) -> Parsed<Option<f64>> {
        self.get(name, "a number", Value::as_f64)
    }
    pub fn need_number(self, name: &str) -> Parsed<f64> {
        self.number(name)?.ok_or_else(|| self.missing(name))
    }
    pub fn numbers(self, name: &str) -> Parsed<Option<Vec<f64>>> {
        self.get(name, "a list of numbers", |v| v.as_array()?.iter().map(Value::as_f64).collect())
    }
    pub fn texts(self, name: &str) -> Parsed<Option<Vec<&'a str>>> {
        self.get(name, "a list of strings", |v| v.as_array()?.iter().map(Value::as_str).collect())
    }
    /// False where absent.
    pub fn flag(self, name: &str) -> Parsed<bool> {
        self.flag_or(name, false)
    }
    pub fn flag_or(self, name: &str, absent: bool) -> Parsed<bool> {
        Ok(self.get(name, "true or false", Value::as_bool)?.unwrap_or(absent))
    }
    pub fn text(self, name: &str) -> Parsed<Option<&'a str>> {
        self.get(name, "a string", Value::as_str)
    }
    pub fn object(self, name: &str, prefix: &'static str) -> Parsed<Option<Fields<'a>>> {
        Ok(self.get(name, "an object", Value::as_object)?.map(|map| Fields { map, prefix }))
    }
}
