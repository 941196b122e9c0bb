//! Validates a value against a schema of the description, with the part of JSON Schema that the description uses. It is
//! stricter in one point: a key that is not described is an error.

use serde_json::Value;

/// Why `value` does not match `schema`; empty when it does. `at` is the place of the value, for the message.
pub fn misfits(document: &Value, schema: &Value, value: &Value, at: &str) -> Vec<String> {
    if let Some(to) = schema["$ref"].as_str() {
        let found = document.pointer(to.strip_prefix('#').unwrap());
        let found = found.unwrap_or_else(|| panic!("{to} does not resolve"));
        return misfits(document, found, value, at);
    }
    if let Some(all) = schema["oneOf"].as_array().or(schema["anyOf"].as_array()) {
        let tries: Vec<_> = all.iter().map(|one| misfits(document, one, value, at)).collect();
        return match tries.iter().any(Vec::is_empty) {
            true => Vec::new(),
            false => tries.into_iter().flatten().collect(),
        };
    }
    let mut wrong = Vec::new();
    let mut say = |why: String| wrong.push(format!("{at}: {why}: {value}"));
    let types: Vec<&str> = match &schema["type"] {
        Value::String(only) => vec![only],
        Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
        Value::Null => Vec::new(),
        other => panic!("{at}: a type of {other}"),
    };
    if !types.is_empty() && !types.iter().any(|of| is(of, value)) {
        say(format!("not of type {types:?}"));
    }
    if let (Some(words), false) = (schema["enum"].as_array(), value.is_null())
        && !words.contains(value)
    {
        say(format!("none of {words:?}"));
    }
    if let (Some(minimum), Some(number)) = (schema["minimum"].as_f64(), value.as_f64())
        && number < minimum
    {
        say(format!("below {minimum}"));
    }
    if let (Some(maximum), Some(number)) = (schema["maximum"].as_f64(), value.as_f64())
        && number > maximum
    {
        say(format!("above {maximum}"));
    }
    if let (Some("date-time"), Some(text)) = (schema["format"].as_str(), value.as_str())
        && !is_time(text)
    {
        say("no time".into());
    }
    for key in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if value.is_object() && value.get(key).is_none() {
            say(format!("{key} is missing"));
        }
    }
    for (key, value) in value.as_object().into_iter().flatten() {
        let at = format!("{at}.{key}");
        match (schema["properties"].get(key), schema.get("additionalProperties")) {
            (Some(property), _) => wrong.extend(misfits(document, property, value, &at)),
            (None, Some(Value::Object(other))) => {
                wrong.extend(misfits(document, &Value::Object(other.clone()), value, &at));
            }
            (None, _) if schema["properties"].is_object() => wrong.push(format!("{at}: is not described")),
            (None, _) => {}
        }
    }
    for (number, value) in value.as_array().into_iter().flatten().enumerate() {
        wrong.extend(misfits(document, &schema["items"], value, &format!("{at}[{number}]")));
    }
    wrong
}

fn is(of: &str, value: &Value) -> bool {
    match of {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("a type of {other}"),
    }
}

/// Whether a text is a time as plyfs writes it: RFC 3339 in UTC.
fn is_time(text: &str) -> bool {
    let shape: String = text.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    let Some(rest) = shape.strip_prefix("0000-00-00T00:00:00").and_then(|rest| rest.strip_suffix('Z')) else {
        return false;
    };
    rest.is_empty()
        || rest.strip_prefix('.').is_some_and(|digits| !digits.is_empty() && digits.chars().all(|c| c == '0'))
}

#[test]
fn the_validator_accepts_matching_values_and_rejects_others() {
    use serde_json::json;
    let document = json!({"components": {"schemas": {"A": {
        "type": "object",
        "required": ["n"],
        "properties": {
            "n": {"type": "integer", "minimum": 1},
            "at": {"type": ["string", "null"], "format": "date-time"},
            "state": {"type": "string", "enum": ["ok"]},
            "more": {"oneOf": [{"type": "null"}, {"$ref": "#/components/schemas/A"}]},
            "by_name": {"type": "object", "additionalProperties": {"type": "boolean"}},
            "list": {"type": "array", "items": {"type": "string"}},
        },
    }}}});
    let schema = json!({"$ref": "#/components/schemas/A"});
    let fits = |value: Value| misfits(&document, &schema, &value, "a").is_empty();
    assert!(fits(
        json!({"n": 1, "at": null, "state": "ok", "more": {"n": 2}, "by_name": {"x": true}, "list": ["a"]})
    ));
    assert!(fits(json!({"n": 1, "at": "2026-11-21T10:00:00.123Z", "more": null})));
    for wrong in [
        json!({}),
        json!([]),
        json!({"n": 0}),
        json!({"n": "1"}),
        json!({"n": 1, "at": "yesterday"}),
        json!({"n": 1, "state": "bad"}),
        json!({"n": 1, "more": {"n": 0}}),
        json!({"n": 1, "by_name": {"x": 1}}),
        json!({"n": 1, "list": [1]}),
        json!({"n": 1, "other": 1}),
    ] {
        assert!(!fits(wrong.clone()), "{wrong}");
    }
}
