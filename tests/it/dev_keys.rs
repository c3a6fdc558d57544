//! Development keys: `token` says which one it used, and a token of another one is told from a broken one.

use std::fs;

use reqwest::Client as Http;
use serde_json::json;
use tempfile::TempDir;

use crate::{
    doctor::names,
    support::{
        Client,
        process::{Process, run, switchboard, token},
    },
};

#[test]
fn token_says_where_its_key_is_and_whether_it_made_one() {
    let root = TempDir::new().unwrap();
    let key = fs::canonicalize(root.path()).unwrap().join("data/dev-key.pem").display().to_string();
    let ask = || {
        // As the default is: relative to the working directory.
        let mut command = switchboard(&["token", "--user", "ann"], &[("DATA_DIR", "data")]);
        let ran = command.current_dir(root.path()).output().unwrap();
        assert_eq!(String::from_utf8(ran.stdout).unwrap().matches('.').count(), 2);
        String::from_utf8(ran.stderr).unwrap()
    };
    let first = ask();
    assert_eq!(first.lines().count(), 1, "{first}");
    for word in ["made a new development key", &key, "DEV_KEY_FILE"] {
        assert!(first.contains(word), "no {word} in {first}");
    }
    assert_eq!(ask(), format!("signed with the development key {key}\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_another_development_key_is_recognised() {
    let (here, there) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let process = Process::start(here.path(), &[]);
    let own = token(here.path(), &["--user", "ann"]);
    let others = token(there.path(), &["--user", "ann"]);
    // The name of its key says whose it was, whatever else was changed.
    let (content, signature) = own.rsplit_once('.').unwrap();
    let first = if signature.starts_with('A') { 'B' } else { 'A' };
    let changed = format!("{content}.{first}{}", &signature[1..]);

    for (token, says) in
        [(&others, "another development key"), (&changed, "signature does not fit")]
    {
        let mut client = Client::open(process.addr, "/web").await;
        client.send(&json!({ "type": "auth", "token": format!("Bearer {token}") })).await;
        let error = client.receive().await;
        assert_eq!(error["code"], "unauthorized", "{error}");
        assert!(error["msg"].as_str().unwrap().contains(says), "{error}");
        let url = format!("http://{}/authors", process.addr);
        let answer = Http::new().get(url).bearer_auth(token).send().await.unwrap();
        assert_eq!(answer.status(), 401);
        let text = answer.text().await.unwrap();
        assert!(text.contains(says), "{text}");

        let settings =
            [("DATA_DIR", here.path().to_str().unwrap()), ("LISTEN_ADDR", "127.0.0.1:0")];
        let ran = run(&["doctor", "--token", token], &settings);
        let key = here.path().join("dev-key.pem").display().to_string();
        names(
            &ran,
            "signature",
            &[says.trim_start_matches("signature "), &key, "switchboard token", "DEV_KEY_FILE"],
        );
        assert!(!ran.stdout.contains("KEYCLOAK"), "{}", ran.stdout);
    }
}
