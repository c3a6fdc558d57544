use proptest::prelude::*;
use serde::Deserialize;

use super::*;

fn free(text: &str) -> Value {
    serde_json::from_str(&Recorded::document(text)).unwrap()
}

fn typed(text: &str) -> Value {
    serde_json::from_str(&Recorded::input::<Order>(text)).unwrap()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code)]
struct Order {
    id: i64,
    note: Option<String>,
    items: Option<Vec<Item>>,
    data: Option<Box<RawValue>>,
    pin: Option<i64>,
}

#[derive(Deserialize)]
#[allow(dead_code)]
struct Item {
    article: String,
}

#[test]
fn secrets_go_at_any_depth() {
    for (raw, expected) in [
        (json!({ "PIN": "hush" }), json!({ "PIN": "***" })),
        (json!({ "pass": { "deep": ["hush"] } }), json!({ "pass": "***" })),
        (json!({ "otp": 4711 }), json!({ "otp": "***" })),
        (json!([{ "a": [{ "iban": "hush" }] }]), json!([{ "a": [{ "iban": "***" }] }])),
        (json!({ "a": 4_111_111_111_111_111_i64 }), json!({ "a": "***" })),
        (json!({ "a": 4.111111111111111e15 }), json!({ "a": "***" })),
        (json!({ "4111 1111 1111 1111": 1 }), json!({ "***": 1 })),
    ] {
        assert_eq!(free(&raw.to_string()), expected);
    }
}

#[test]
fn json_in_a_text_is_looked_through_too() {
    let raw = json!({ "a": " {\"password\":\"hush\",\"b\":1}", "c": "[not json" }).to_string();
    assert_eq!(free(&raw), json!({ "a": "{\"b\":1,\"password\":\"***\"}", "c": "[not json" }));
    // No JSON, and one that is cut: what they say cannot be told from what they hide.
    assert_eq!(free(&json!(["{\"password\": hush}"]).to_string()), json!(["***"]));
    let long = json!({ "b": "x".repeat(30_000), "pin": "hush" }).to_string();
    let shown = free(&json!({ "a": long }).to_string()).to_string();
    assert!(shown.len() < MAX_DATA && !shown.contains("hush"), "{shown}");
}

#[test]
fn blanks_and_members_that_stand_twice_hide_nothing() {
    let blanks = format!("{{\"id\":1{}}}", " ".repeat(17_000));
    assert_eq!(typed(&blanks), json!({ "id": 1 }));
    assert_eq!(free(r#"{"a":1,"a":2,"a":3}"#), json!({ "a": 1, "a#2": 2, "a#3": 3 }));
    assert_eq!(typed(r#"{"id":1,"id":2}"#), json!({ "id": 1, "id#2": 2 }));
}

#[test]
fn what_the_type_does_not_know_is_a_name_alone() {
    let raw = r#"{"id":7,"items":[{"article":"a","colour":"hush"}],"data":{"x":[1,{"y":2}]}}"#;
    let items = json!([{ "article": "a", "colour": "…" }]);
    let expected = json!({ "id": 7, "items": items, "data": { "x": [1, { "y": 2 }] } });
    assert_eq!(typed(raw), expected);
    for (raw, expected) in [
        (r#"{"hint":"hush","id":7}"#, json!({ "hint": "…", "id": 7 })),
        (
            r#"{"id":7,"hint":{"a":"hush"},"pin":1234}"#,
            json!({ "id": 7, "hint": "…", "pin": "***" }),
        ),
        // Not reached, since the one before it does not fit.
        (r#"{"id":"x","items":[{"article":"hush"}]}"#, json!({ "id": "x", "items": "…" })),
        (r#"{"id":{"a":"hush"}}"#, json!({ "id": { "a": "…" } })),
        (r#"{"note":["hush"]}"#, json!({ "note": "…" })),
        (r#"["ann","hush"]"#, json!("…")),
        (r#"{"items":[["hush"]],"id":1}"#, json!({ "items": ["…"], "id": 1 })),
    ] {
        assert_eq!(typed(raw), expected, "{raw}");
    }
}

#[test]
fn what_is_long_is_cut_where_it_stands_and_the_id_stays() {
    let fits = json!({ "a": "x".repeat(MAX_DATA - 8) });
    assert_eq!(free(&fits.to_string()), fits);
    let long = typed(&json!({ "id": 7, "note": "ü".repeat(10_000) }).to_string());
    assert_eq!(long["id"], 7);
    assert_eq!(long["note"], format!("{}… (20000 bytes)", "ü".repeat(512)));
    assert_eq!(free(&json!(vec![7; 5000]).to_string())[1000], "… 4000 more");

    let mut many: Vec<_> = (0..200).map(|i| format!("\"m{i}\":\"{}\"", "x".repeat(900))).collect();
    many.push("\"id\":7".to_owned());
    let shown = typed(&format!("{{{}}}", many.join(",")));
    assert_eq!((&shown["id"], &shown["m0"]), (&json!(7), &json!("…")));
    assert!(shown.to_string().len() <= MAX_DATA);

    let items = vec![json!({ "article": "x".repeat(300) }); 3000];
    let shown = typed(&json!({ "items": items, "note": "y".repeat(9000), "id": 7 }).to_string());
    assert_eq!(shown["id"], 7);
    assert!(shown["note"].as_str().unwrap().starts_with("yyyy"), "{shown}");
    assert!(shown["items"][0]["article"].as_str().unwrap().starts_with("xxxx"), "{shown}");
}

#[test]
fn a_type_of_very_many_members_still_has_its_numbers() {
    let members: Map<_, _> = (0..900)
        .map(|i| (format!("{i:03}{}", "\u{1}".repeat(90)), json!("z".repeat(90))))
        .collect();
    let shown =
        bounded(Value::Object(members.into_iter().chain([("zz".into(), json!(7))]).collect()));
    assert_eq!(shown["zz"], 7);
    assert!(shown.to_string().len() <= MAX_DATA);
}

#[test]
fn what_a_database_or_a_reader_could_stumble_over_is_replaced() {
    assert_eq!(free(r#"{"a\u0000":"b\u0000c"}"#), json!({ "a\u{fffd}": "b\u{fffd}c" }));
    for (member, bytes) in [("1e999", 5), (r#""\ud800""#, 8)] {
        let shown = typed(&format!("{{\"id\":7,\"data\":{member}}}"));
        assert_eq!(shown, json!({ "id": 7, "data": { "_unreadable_bytes": bytes } }));
    }
    let deep = format!("{{\"data\":{}{},\"id\":7}}", "[".repeat(200), "]".repeat(200));
    assert_eq!(typed(&deep)["id"], 7);
    for unreadable in ["{\"a\":NaN}", "{", "{\"id\":1} x"] {
        assert_eq!(free(unreadable), json!({ "_unreadable_bytes": unreadable.len() }));
    }
}

/// Any document, with a secret in it under a name that says so.
fn documents() -> impl Strategy<Value = (Value, String)> {
    let names = prop::sample::select(vec![
        "password", "pass", "passwort", "otp", "pin", "cookie", "session", "iban", "token", "cvv",
    ]);
    let name = (names, any::<[bool; 8]>(), "(|my_|x-|1)", "(|_1|-x)").prop_map(
        |(name, upper, before, after)| {
            let one = upper[0];
            let case = |(i, c): (usize, char)| match if i == 0 { one } else { upper[1] } {
                true => c.to_ascii_uppercase(),
                false => c,
            };
            format!("{before}{}{after}", name.chars().enumerate().map(case).collect::<String>())
        },
    );
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        "[a-z \"{\\[]{0,12}".prop_map(Value::from),
    ];
    let planted =
        name.prop_map(|name| json!({ name: ["hunter2-4711", { "deep": "hunter2-4711" }] }));
    let document = planted.prop_recursive(6, 24, 4, move |inner| {
        let filler = leaf.clone();
        let members = prop::collection::vec(("[a-z]{1,6}", filler), 0..3);
        (inner, members, "[a-d]{1,3}", 0..4).prop_map(|(inner, members, name, how)| {
            let mut object: Map<String, Value> = members.into_iter().collect();
            match how {
                0 => return json!([1, inner, object]),
                1 => object.insert(name, inner.to_string().into()),
                2 => object.insert(name, json!([inner])),
                _ => object.insert(name, inner),
            };
            Value::Object(object)
        })
    });
    document.prop_map(|document| {
        let text = document.to_string();
        (document, text)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_planted_secret_is_never_shown((_, text) in documents()) {
        for shown in [
            Recorded::document(&text),
            Recorded::document(&text.replace("hunter2", &"hunter2".repeat(900))),
            Recorded::input::<Order>(&text),
            Recorded::input::<Value>(&text[..text.len() - 1]),
        ] {
            prop_assert!(!shown.contains("hunter2"), "{} of {text}", &*shown);
            prop_assert!(shown.len() <= MAX_DATA);
            prop_assert!(serde_json::from_str::<Value>(&shown).is_ok());
        }
    }

    #[test]
    fn whatever_comes_is_json_of_a_bounded_size(text in "[\\[\\]{}\",:0-9a-c \\\\]{0,60}") {
        let shown = Recorded::document(&text);
        prop_assert!(serde_json::from_str::<Value>(&shown).is_ok() && shown.len() <= MAX_DATA);
    }
}

#[test]
fn a_text_that_is_json_of_a_text_is_looked_into() {
    let inner = json!({ "password": "hunter2" }).to_string();
    let raw = json!({ "a": Value::from(Value::from(inner).to_string()) }).to_string();
    assert!(!Recorded::document(&raw).contains("hunter2"), "{:?}", Recorded::document(&raw));
}
