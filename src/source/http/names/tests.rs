use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use reqwest::Client;

use super::*;

/// Longer than any lookup of these tests takes that nothing delays.
const LONG: Duration = Duration::from_secs(20);

fn hang(begun: &AtomicUsize, ends: &AtomicBool) {
    begun.fetch_add(1, Ordering::SeqCst);
    while !ends.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < LONG, "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn client(names: &Arc<Names>) -> Client {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let builder = Client::builder().tls_backend_preconfigured(tls).no_proxy();
    builder.dns_resolver(ToAnywhere(names.clone())).build().unwrap()
}

/// Regression: a server that redirected to another slow name each time held all 32 lookups, and no other base had one.
/// Guards H10.
#[tokio::test]
async fn names_that_hang_for_one_base_keep_no_lookup_from_another() {
    static BEGUN: AtomicUsize = AtomicUsize::new(0);
    static ENDS: AtomicBool = AtomicBool::new(false);
    let names = Arc::new(Names::with(|name| {
        if name.starts_with("slow") {
            hang(&BEGUN, &ENDS);
        }
        Err("no such name".into())
    }));
    let (client, hog) = (client(&names), Party::new());
    let slow: Vec<_> = (0..100)
        .map(|number| {
            let request = client.get(format!("http://slow-{number}.example/")).send();
            tokio::spawn(on_behalf_of(hog, async move { request.await.map(drop) }))
        })
        .collect();
    until("no lookup begins", || BEGUN.load(Ordering::SeqCst) >= EACH).await;
    // Of another base, with several URLs, and of none.
    let other = Party::new();
    for name in ["a.example", "b.example", "c.example"] {
        let found = on_behalf_of(other, names.lookup(name));
        tokio::time::timeout(LONG, found).await.expect("it does not wait").unwrap_err();
    }
    tokio::time::timeout(LONG, names.lookup("d.example")).await.expect("it does not wait").unwrap_err();
    // A name that waits for the turn of the one base is looked up for another.
    let asked = names.clone();
    let shared = tokio::spawn(on_behalf_of(other, async move { asked.lookup("slow-99.example").await }));
    until("it waits for the turn of the first", || BEGUN.load(Ordering::SeqCst) > EACH).await;
    assert_eq!(BEGUN.load(Ordering::SeqCst), EACH + 1, "of the base that hangs");
    ENDS.store(true, Ordering::SeqCst);
    shared.await.unwrap().unwrap_err();
    for request in slow {
        tokio::time::timeout(LONG, request).await.expect("no lookup is lost").unwrap().unwrap_err();
    }
    assert_eq!(BEGUN.load(Ordering::SeqCst), 100, "one lookup per name");
    until("the threads end", || names.state.lock().threads == 0).await;
    let state = names.state.lock();
    assert!(state.asked.is_empty() && state.queue.is_empty() && state.running.is_empty());
}

/// However many bases have names that hang, one without a lookup gets one.
#[tokio::test]
async fn a_base_gets_a_first_lookup_when_all_are_held() {
    static BEGUN: AtomicUsize = AtomicUsize::new(0);
    static ENDS: AtomicBool = AtomicBool::new(false);
    let names = Arc::new(Names::with(|name| {
        if name.starts_with("slow") {
            hang(&BEGUN, &ENDS);
        }
        Ok(Vec::new())
    }));
    let mut slow = Vec::new();
    for base in 0..THREADS / EACH + 1 {
        let party = Party::new();
        for number in 0..EACH {
            let names = names.clone();
            let asking = async move { names.lookup(&format!("slow-{base}-{number}")).await };
            slow.push(tokio::spawn(on_behalf_of(party, asking)));
        }
    }
    // All, and the first of the last base.
    until("a lookup waits", || BEGUN.load(Ordering::SeqCst) > THREADS).await;
    tokio::time::timeout(LONG, names.lookup("quick")).await.expect("it does not wait").unwrap();
    assert_eq!(BEGUN.load(Ordering::SeqCst), THREADS + 1);
    ENDS.store(true, Ordering::SeqCst);
    for asking in slow {
        tokio::time::timeout(LONG, asking).await.expect("no lookup is lost").unwrap().unwrap();
    }
}

/// A read whose deadline is over leaves no lookup behind for later ones to wait for.
#[tokio::test]
async fn a_name_that_no_request_waits_for_is_not_looked_up() {
    static BEGUN: AtomicUsize = AtomicUsize::new(0);
    static ENDS: AtomicBool = AtomicBool::new(false);
    let names = Arc::new(Names::with(|_| {
        hang(&BEGUN, &ENDS);
        Ok(Vec::new())
    }));
    let party = Party::new();
    let ask = |number: usize| {
        let names = names.clone();
        let asking = async move { names.lookup(&format!("name-{number}")).await };
        tokio::spawn(on_behalf_of(party, asking))
    };
    let asked: Vec<_> = (0..EACH + 3).map(ask).collect();
    until("no lookup begins", || BEGUN.load(Ordering::SeqCst) >= EACH).await;
    until("they wait", || names.state.lock().queue.len() == 3).await;
    for gone in &asked[EACH..EACH + 2] {
        gone.abort();
    }
    until("they are gone", || asked[EACH + 1].is_finished()).await;
    ENDS.store(true, Ordering::SeqCst);
    for (number, asking) in asked.into_iter().enumerate() {
        let found = tokio::time::timeout(LONG, asking).await.expect("no lookup is lost");
        assert_eq!(found.is_ok(), !(EACH..EACH + 2).contains(&number));
    }
    assert_eq!(BEGUN.load(Ordering::SeqCst), EACH + 1);
}
