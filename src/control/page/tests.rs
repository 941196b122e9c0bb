use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::channel;

use super::*;

/// Short, so that tests wait little.
const SHORT: Limits = Limits {
    header: Duration::from_millis(300),
    answer: Duration::from_millis(500),
    connection: Duration::from_millis(600),
    last_answer: Duration::from_millis(300),
};

/// Serves `data` as the page does; returns its address.
fn serve(data: Router, reach: Reach) -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let router = router(data, reach, SHORT);
    std::thread::spawn(move || runtime.block_on(serve_tcp(listener.into(), router, SHORT)));
    address
}

fn data() -> Router {
    Router::new().route("/v1/disks", get(|| async { "[]" }))
}

/// The answer to a request, as text. Empty when the connection ends without one.
fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("connected");
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn get_as(address: SocketAddr, path: &str, headers: &str) -> String {
    exchange(address, &format!("GET {path} HTTP/1.1\r\n{headers}connection: close\r\n\r\n"))
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or("none")
}

#[test]
fn hosts_that_cannot_be_rebound_are_accepted_and_names_are_not() {
    for host in
        ["127.0.0.1", "127.0.0.1:8080", "192.0.2.1:1", "[::1]", "[::1]:8080", "localhost", "LOCALHOST:80"]
    {
        assert!(origin::is_own(host), "{host}");
    }
    for host in [
        "",
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[::1",
        "::1",
        "127.0.0.1:x",
        "127.0.0.1:99999",
        "[evil]:80",
        "localhost:",
        "127.0.0.1 ",
    ] {
        assert!(!origin::is_own(host), "{host}");
    }
}

/// Guards D72.
#[test]
fn a_foreign_host_name_and_a_request_of_another_sites_page_are_refused() {
    let address = serve(data(), Reach::Browsers);
    let own = "host: 127.0.0.1\r\n";
    assert_eq!(status(&get_as(address, "/v1/disks", own)), "200");
    assert_eq!(status(&get_as(address, "/v1/disks", "host: evil.example\r\n")), "421");
    assert_eq!(status(&get_as(address, "/", "host: evil.example\r\n")), "421");
    assert_eq!(status(&get_as(address, "/v1/disks", &format!("{own}host: evil.example\r\n"))), "421");
    assert_eq!(status(&get_as(address, "http://evil.example/v1/disks", own)), "421");
    assert_eq!(status(&get_as(address, "/v1/disks", "")), "421");
    for site in ["cross-site", "same-site"] {
        let foreign = format!("{own}sec-fetch-site: {site}\r\n");
        assert_eq!(status(&get_as(address, "/v1/disks", &foreign)), "403");
        let link = format!("{foreign}sec-fetch-mode: navigate\r\nsec-fetch-dest: document\r\n");
        assert_eq!(status(&get_as(address, "/", &link)), "200");
    }
    assert_eq!(
        status(&get_as(address, "/v1/disks", &format!("{own}sec-fetch-site: same-origin\r\n"))),
        "200"
    );
    // A Unix socket has no browser that could be led astray.
    let socket = serve(data(), Reach::Socket);
    assert_eq!(status(&get_as(socket, "/v1/disks", "host: plyfs\r\n")), "200");
}

/// Guards D72.
#[test]
fn no_method_but_get_is_answered_whatever_the_routes() {
    let data = data().route("/v1/stop", axum::routing::post(|| async { "stopped" }));
    let address = serve(data, Reach::Browsers);
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE"] {
        for path in ["/v1/disks", "/v1/stop", "/"] {
            let request = format!(
                "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            );
            let answer = exchange(address, &request);
            assert_ne!(status(&answer), "200", "{method} {path}");
            assert!(!answer.contains("stopped") && !answer.contains("access-control"), "{answer}");
        }
    }
    // Without a body, and with the type of a file.
    let head = exchange(address, "HEAD /style.css HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n");
    assert!(status(&head) == "200" && head.contains("text/css"), "{head}");
}

#[test]
fn every_answer_has_the_policy_that_allows_the_programs_own_files_only() {
    let address = serve(data(), Reach::Browsers);
    for path in ["/", "/app.js", "/style.css", "/v1/disks", "/nowhere"] {
        let answer = get_as(address, path, "host: 127.0.0.1\r\n");
        assert!(answer.contains("content-security-policy: default-src 'self'; base-uri 'none'"), "{answer}");
        assert!(
            answer.contains("x-content-type-options: nosniff") && answer.contains("cache-control: no-"),
            "{answer}"
        );
    }
}

#[test]
fn the_files_name_no_other_origin_and_only_files_that_are_there() {
    let all = assets::all();
    for (path, content) in &all {
        for (at, _) in content.match_indices("//") {
            let before = &content[..at];
            let is_comment = before.lines().last().unwrap_or_default().trim().is_empty();
            let is_namespace = content[at..].starts_with("//www.w3.org/2000/svg");
            assert!(is_comment || is_namespace, "{path} names another origin at {at}");
        }
        assert!(!content.contains("innerHTML") && !content.contains("eval("), "{path} makes code of text");
        for import in content.split(" from \"./").skip(1) {
            let file = format!("/{}", import.split('"').next().unwrap_or_default());
            assert!(all.iter().any(|(path, _)| **path == file), "{path} imports {file}");
        }
    }
}

#[test]
fn clients_that_send_nothing_or_read_nothing_are_cut_off_and_others_are_served() {
    let big = "x".repeat(64 << 20);
    let data = data().route("/v1/big", get(move || async move { big }));
    let address = serve(data, Reach::Browsers);
    let mut slow: Vec<TcpStream> =
        (0..CONNECTIONS - 2).map(|_| TcpStream::connect(address).expect("connected")).collect();
    // A request that never ends, and an answer that is never read.
    slow[0].write_all(b"GET /v1/disks HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ").expect("sent");
    for _ in 0..2 {
        let mut reads_nothing = TcpStream::connect(address).expect("connected");
        reads_nothing.write_all(b"GET /v1/big HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n").expect("sent");
        slow.push(reads_nothing);
    }
    // More than fit: this one waits in the socket until the first are cut off.
    assert_eq!(status(&get_as(address, "/v1/disks", "host: 127.0.0.1\r\n")), "200");
    let mut rest = Vec::new();
    let _ = slow[1].read_to_end(&mut rest);
    assert!(slow[1].read(&mut [0]).is_ok_and(|bytes| bytes == 0), "the silent client is still connected");
}

#[test]
fn work_that_hangs_is_bounded_and_its_clients_get_an_answer() {
    let (release, wait) = channel::<()>();
    let wait = Arc::new(parking_lot::Mutex::new(wait));
    let begun = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = begun.clone();
    let hang = move || {
        let (wait, count) = (wait.clone(), count.clone());
        async move {
            count.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
            let hung = tokio::task::spawn_blocking(move || wait.lock().recv().is_ok());
            let _ = hung.await;
            "late"
        }
    };
    let address = serve(data().route("/v1/hang", get(hang)), Reach::Browsers);
    let clients: Vec<_> = (0..3 * REQUESTS)
        .map(|_| std::thread::spawn(move || get_as(address, "/v1/hang", "host: 127.0.0.1\r\n")))
        .collect();
    for client in clients {
        let answer = client.join().expect("no panic");
        assert!(status(&answer) == "503" && answer.contains("does not answer in time"), "{answer}");
    }
    assert!(begun.load(std::sync::atomic::Ordering::Acquire) <= REQUESTS);
    drop(release);
}

#[test]
fn a_request_that_is_too_long_is_refused() {
    let address = serve(data(), Reach::Browsers);
    let long = format!("GET /{} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", "x".repeat(4 * LONGEST_REQUEST));
    let mut stream = TcpStream::connect(address).expect("connected");
    let _ = stream.write_all(long.as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(!String::from_utf8_lossy(&answer).contains(" 200 "));
    let many = "x: y\r\n".repeat(MOST_HEADERS + 1);
    assert_ne!(status(&get_as(address, "/v1/disks", &format!("host: 127.0.0.1\r\n{many}"))), "200");
    assert_eq!(status(&get_as(address, "/v1/disks", "host: 127.0.0.1\r\n")), "200");
}
