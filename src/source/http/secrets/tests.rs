use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reqwest::Url;
use tokio::time::timeout;

use super::{Credentials, Key, Keyring, Kind, LentHeaders, Secret, SecretName, basic, covers, headers};
use crate::config::{CredentialConfig, HttpConfig};

#[test]
fn a_user_and_a_password_are_one_header_line() {
    // The example of RFC 7617.
    assert_eq!(*basic("Aladdin", "open sesame"), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
    assert_eq!(*basic("test", "123\u{a3}"), "Basic dGVzdDoxMjPCow==");
    assert_eq!(*basic("", ""), "Basic Og==");
}

#[test]
fn a_scope_covers_whole_segments_of_a_path() {
    for (scope, url, inside) in [
        ("https://h/", "https://h/a/b?c", true),
        ("https://h", "https://h/a", true),
        ("https://h/a", "https://h/a", true),
        ("https://h/a", "https://h/a/b", true),
        ("https://h/a", "https://h/ab", false),
        ("https://h/a/", "https://h/a/b", true),
        ("https://h/a/", "https://h/a", false),
        ("https://h/a/", "https://h/a/../b", false),
        ("https://h/a/", "https://h/a/%2e%2e/b", false),
        ("https://h/a/", "https://h/a/..%2Fb", false),
        ("https://h/a/", "https://h/a/%2e%2e%2fb", false),
        ("https://h/a/", "https://h/a/.%2E%2Fb", false),
        ("https://h/a/", "https://h/a/c%2f..", false),
        ("https://h/a/", "https://h/a/..%5Cb", false),
        ("https://h/a/", "https://h/a/b..%2fc", true),
        ("https://h/", "http://h/", false),
        ("https://h/", "https://h:8443/", false),
        ("https://h:443/", "https://h/", true),
        ("https://h/", "https://hh/", false),
        ("https://h/", "https://h.evil.example/", false),
        ("https://H/", "https://h/", true),
    ] {
        let parse = |text| Url::parse(text).unwrap();
        assert_eq!(covers(&parse(scope), &parse(url)), inside, "{scope} {url}");
    }
}

#[test]
fn credentials_of_a_wrong_form_are_refused_without_being_shown() {
    let lines = |kind, text: &str| {
        headers(kind, &Secret::new(text.into())).map(|headers| {
            let line = |(name, value): (&_, &reqwest::header::HeaderValue)| {
                assert!(value.is_sensitive());
                format!("{name}: {}", value.to_str().unwrap())
            };
            headers.iter().map(line).collect::<Vec<_>>()
        })
    };
    assert_eq!(lines(Kind::Bearer, " abc\n").unwrap(), ["authorization: Bearer abc"]);
    assert_eq!(
        lines(Kind::Basic, "Aladdin:open sesame\n").unwrap(),
        ["authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="]
    );
    assert_eq!(lines(Kind::Either, "eyJ0.a-b_c==\n").unwrap(), ["authorization: Bearer eyJ0.a-b_c=="]);
    assert_eq!(lines(Kind::Either, "X-Auth-Token: 5\n\nX-More:6").unwrap(), ["x-auth-token: 5", "x-more: 6"]);
    for (kind, text) in [
        (Kind::Bearer, ""),
        (Kind::Bearer, "a\nb"),
        (Kind::Bearer, "a\u{1}b"),
        (Kind::Basic, "nobody"),
        (Kind::Headers, "token"),
        (Kind::Headers, "Range: bytes=0-1"),
        (Kind::Headers, "Host: other"),
        (Kind::Headers, "a b: c"),
        (Kind::Either, "two words"),
    ] {
        let why = lines(kind, text).expect_err(text);
        assert!(text.is_empty() || !why.contains(text), "{why}");
    }
    assert_eq!(format!("{:?}", Secret::new("hidden".into())), "Secret(..)");
}

/// As long as it hangs at most: a runtime waits for its threads.
const LONG: Duration = Duration::from_secs(12);

/// Secrets with numbers; it hangs when it is told to.
#[derive(Default)]
struct Helper {
    reads: AtomicUsize,
    hangs: AtomicBool,
}

impl Credentials for Helper {
    fn get(&self, _name: SecretName) -> Result<Secret, String> {
        let number = self.reads.fetch_add(1, Ordering::SeqCst) + 1;
        let begin = Instant::now();
        while self.hangs.load(Ordering::SeqCst) && begin.elapsed() < LONG {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Secret::new(format!("token-{number}").into()))
    }
}

fn key(renew: Option<Duration>) -> (Arc<Helper>, Arc<Key>) {
    let helper = Arc::new(Helper::default());
    let credential = CredentialConfig {
        url: "https://h/".into(),
        bearer_file: Some("/token".into()),
        basic_file: None,
        header_file: None,
        command: None,
        renew,
    };
    let config = HttpConfig { credentials: vec![credential], ..HttpConfig::default() };
    let reader: Arc<dyn Credentials> = helper.clone();
    (helper, Keyring::new(&config, &reader).0[0].0.clone())
}

/// The token, which does not wait for one that is being read.
async fn at_once(key: &Arc<Key>) -> String {
    let held = timeout(Duration::from_secs(5), key.current()).await.expect("it does not wait");
    let headers = held.unwrap_or_else(|_| panic!("a token")).headers;
    headers["authorization"].to_str().unwrap().to_owned()
}

async fn reads(helper: &Helper, wanted: usize) {
    while helper.reads.load(Ordering::SeqCst) < wanted {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Regression: all requests waited 15 s for a file on a filesystem that hangs, each time that it was to be read again.
/// Guards H6.
#[tokio::test]
async fn requests_go_on_with_a_credential_whose_renewal_hangs() {
    let (helper, key) = key(Some(Duration::from_millis(20)));
    assert_eq!(at_once(&key).await, "Bearer token-1");
    helper.hangs.store(true, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(at_once(&key).await, "Bearer token-1");
    reads(&helper, 2).await;
    assert_eq!(at_once(&key).await, "Bearer token-1");
    helper.hangs.store(false, Ordering::SeqCst);
    while at_once(&key).await == "Bearer token-1" {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// One server in the scope refuses a credential that others accept.
/// Guards H6.
#[tokio::test]
async fn requests_go_on_while_a_credential_that_was_refused_is_read_again() {
    let (helper, key) = key(None);
    assert_eq!(at_once(&key).await, "Bearer token-1");
    helper.hangs.store(true, Ordering::SeqCst);
    let held = key.current().await.unwrap_or_else(|_| panic!("a token"));
    let lent = LentHeaders { headers: held.headers, generation: held.generation };
    let renewing = tokio::spawn({
        let key = key.clone();
        async move { key.renew(&lent).await }
    });
    reads(&helper, 2).await;
    assert_eq!(at_once(&key).await, "Bearer token-1");
    helper.hangs.store(false, Ordering::SeqCst);
    assert!(renewing.await.unwrap());
    assert_eq!(at_once(&key).await, "Bearer token-2");
}
