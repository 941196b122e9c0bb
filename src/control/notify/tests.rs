use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc::channel;

use parking_lot::Mutex;
use serde_json::Value;

use super::*;
use crate::config::{CredentialConfig, HttpConfig};
use crate::events::{Event, Kind, QUEUE};
use crate::source::http::{Credentials, Network, Proxies, Secret, SecretName};

const SOON: Duration = Duration::from_secs(30);

fn objects(input: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(input).expect("text");
    text.lines().map(|line| serde_json::from_str(line).expect("an object")).collect()
}

fn names(input: &[u8]) -> Vec<String> {
    objects(input).iter().map(|event| event["event"].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn a_command_gets_the_wanted_events_as_lines() {
    let (sender, inputs) = channel();
    let sender = Mutex::new(sender);
    let run = move |input: &[u8]| sender.lock().send(input.to_vec()).map_err(|error| error.to_string());
    let events = Events::new();
    let config = NotifyConfig {
        events: vec!["base.hit".into(), "base.miss".into(), "base.evict".into()],
        ..NotifyConfig::default()
    };
    let counts = Arc::default();
    let destination = Destination::Command(Box::new(run));
    spawn(&config, &events, vec![destination], &counts).expect("a thread");
    events.emit(Event::new(Kind::WorkerStarted));
    events.emit(Event::of_base(Kind::BaseMiss, "debian").bytes(16384).because("demand"));
    events.emit(Event::of_base(Kind::BaseEvict, "debian").bytes(4096).because("space"));
    let input = inputs.recv_timeout(SOON).expect("a delivery");
    assert_eq!(names(&input), ["base.miss", "base.evict"]);
    let first = &objects(&input)[0];
    assert_eq!((first["base"].as_str(), first["bytes"].as_u64()), (Some("debian"), Some(16384)));
    events.emit(Event::of_base(Kind::BaseHit, "debian").bytes(1));
    assert_eq!(names(&inputs.recv_timeout(SOON).expect("a delivery")), ["base.hit"]);
    events.close();
    // The thread ends with the bus, and drops the sender.
    assert!(inputs.recv_timeout(SOON).is_err());
    assert_eq!(counts.counts(), (3, 0));
}

#[test]
fn a_destination_that_hangs_delays_no_event_and_learns_how_many_it_lost() {
    let (sender, inputs) = channel();
    let sender = Mutex::new(sender);
    let (release, released) = channel::<()>();
    let released = Mutex::new(released);
    let run = move |input: &[u8]| {
        let sent = sender.lock().send(input.to_vec()).map_err(|error| error.to_string());
        let _ = released.lock().recv_timeout(SOON);
        sent
    };
    let events = Events::new();
    let counts = Arc::default();
    let destination = Destination::Command(Box::new(run));
    spawn(&NotifyConfig::default(), &events, vec![destination], &counts).expect("a thread");
    events.emit(Event::of_base(Kind::BaseChanged, "first"));
    assert_eq!(names(&inputs.recv_timeout(SOON).expect("a delivery")), ["base.changed"]);
    // It hangs now, and emitting does not wait for it.
    for _ in 0..QUEUE + 10 {
        events.emit(Event::of_base(Kind::BaseError, "b"));
    }
    drop(release);
    let next = objects(&inputs.recv_timeout(SOON).expect("a delivery"));
    assert_eq!((next[0]["event"].as_str(), next[0]["count"].as_u64()), (Some("lost"), Some(10)));
    assert_eq!(next[1]["event"], "base.error");
    events.close();
}

#[test]
fn events_that_cannot_be_delivered_are_dropped_and_counted() {
    let events = Events::new();
    let counts: Arc<Notifications> = Arc::default();
    let tries = Arc::new(AtomicU64::new(0));
    let seen = tries.clone();
    let run = move |_: &[u8]| {
        seen.fetch_add(1, Ordering::Relaxed);
        Err("no".to_owned())
    };
    let deliverer = Deliverer {
        config: NotifyConfig::default(),
        listener: events.listen(None).expect("room"),
        destination: Arc::new(Destination::Command(Box::new(run))),
        counts: counts.clone(),
        pause: Duration::from_millis(1),
    };
    events.emit(Event::of_base(Kind::BaseError, "b"));
    events.close();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(deliverer.run());
    assert_eq!((counts.counts(), tries.load(Ordering::Relaxed)), ((0, 1), u64::from(TRIES)));
}

/// Has the token of each credential.
struct Token;

impl Credentials for Token {
    fn get(&self, _name: SecretName) -> Result<Secret, String> {
        Ok(Secret::new(b"token-of-the-hook".to_vec()))
    }
}

/// Answers one request with `status`, and returns it, its head in lower case.
fn answer_one(listener: &TcpListener, status: &str) -> (String, Vec<u8>) {
    let (stream, _) = listener.accept().expect("a connection");
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(reader.read_line(&mut head).expect("a head") > 0, "{head}");
    }
    let head = head.to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
    let mut body = vec![0; length.parse().expect("a number")];
    reader.read_exact(&mut body).expect("a body");
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    reader.get_mut().write_all(answer.as_bytes()).expect("answered");
    (head, body)
}

#[test]
fn a_web_server_gets_events_with_its_token_and_again_after_a_failure() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let url = format!("http://{}/hook", listener.local_addr().expect("an address"));
    let credential = CredentialConfig {
        url: url.clone(),
        bearer_file: Some("/secrets/hook".into()),
        basic_file: None,
        header_file: None,
        command: None,
        renew: None,
    };
    let config = HttpConfig { credentials: vec![credential], ..HttpConfig::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let network = Network::prepare(&config, Proxies::default());
    let http = Http::new(&config, &network, Arc::new(Token), runtime.handle().clone()).expect("a client");
    let events = Events::new();
    let counts: Arc<Notifications> = Arc::default();
    let destinations = vec![Destination::Web(http.clone(), url.clone())];
    spawn(&NotifyConfig::default(), &events, destinations, &counts).expect("a thread");
    events.emit(Event::of_base(Kind::BaseMiss, "debian").bytes(16384).because("demand"));
    let (_, refused) = answer_one(&listener, "503 Unavailable");
    let (head, body) = answer_one(&listener, "204 No Content");
    assert!(head.starts_with("post /hook http/1.1"), "{head}");
    assert!(head.contains("authorization: bearer token-of-the-hook"), "{head}");
    assert!(head.contains("content-type: application/x-ndjson"), "{head}");
    assert_eq!((names(&body), &refused), (vec!["base.miss".to_owned()], &body));
    // No message has the token.
    drop(listener);
    let why = runtime.block_on(http.post(&url, MEDIA, b"x".to_vec())).expect_err("it is gone");
    assert!(why.contains("/hook") && !why.contains("token-of"), "{why}");
    events.close();
}
