//! A network for tests: a TCP proxy that adds latency and shares a bandwidth among its connections.
//!
//!     latency-proxy --to HOST:PORT [--listen HOST:PORT] [--rtt-ms MS] [--mbit N] [--drop-every BYTES] [--seed N] [--control]
//!
//! The proxy prints `listening HOST:PORT`. With `--control` it reads commands from its standard input, and ends with
//! it:
//!   `stats`             prints {"connections":N,"open":N,"up":BYTES,"down":BYTES,"dropped":N}
//!   `stop`, `resume`    stops and resumes all traffic; connections stay open
//!   `drop`              closes all connections at once
//!   `refuse`, `accept`  begins and ends closing new connections at once
//! Each command prints one line, `ok` unless the command prints a result.

mod link;
mod proxy;
#[cfg(test)]
mod tests;

use std::io::{BufRead, Write};
use std::net::TcpListener;
use std::process::exit;
use std::time::Duration;

use proxy::{Proxy, Settings};

fn main() {
    let mut settings = Settings::default();
    let (mut listen, mut control) = ("127.0.0.1:0".to_owned(), false);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if name == "--control" {
            control = true;
            continue;
        }
        let value = arguments.next().unwrap_or_else(|| usage(&format!("{name} needs a value")));
        let number =
            || value.parse::<f64>().unwrap_or_else(|_| usage(&format!("{name}: {value} is not a number")));
        match name.as_str() {
            "--to" => settings.to = value,
            "--listen" => listen = value,
            "--rtt-ms" => settings.round_trip = Duration::from_secs_f64(number() / 1e3),
            "--mbit" => settings.bytes_per_second = number() * 1e6 / 8.0,
            "--drop-every" => settings.drop_every = number() as u64,
            "--seed" => settings.seed = number() as u64,
            _ => usage(&format!("unknown option {name}")),
        }
    }
    if settings.to.is_empty() {
        usage("--to is missing");
    }
    let listener = TcpListener::bind(&listen).unwrap_or_else(|error| {
        eprintln!("latency-proxy: cannot listen on {listen}: {error}; choose another address");
        exit(1);
    });
    settings.overhead = proxy::measure_overhead(settings.round_trip).unwrap_or_else(|error| {
        eprintln!("latency-proxy: cannot measure its own overhead: {error}");
        exit(1);
    });
    let proxy = Proxy::new(settings);
    println!("listening {}", listener.local_addr().expect("it listens"));
    if !control {
        proxy.serve(&listener);
        return;
    }
    let server = proxy.clone();
    std::thread::spawn(move || server.serve(&listener));
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let mut answer = "ok".to_owned();
        match line.trim() {
            "stats" => answer = proxy.stats().to_json(),
            "stop" => proxy.stop(),
            "resume" => proxy.resume(),
            "drop" => proxy.drop_all(),
            "refuse" => proxy.refuse(true),
            "accept" => proxy.refuse(false),
            other => answer = format!("unknown command: {other}"),
        }
        println!("{answer}");
        let _ = std::io::stdout().flush();
    }
}

fn usage(why: &str) -> ! {
    eprintln!(
        "latency-proxy: {why}\nusage: latency-proxy --to HOST:PORT [--listen HOST:PORT] [--rtt-ms MS] [--mbit N]"
    );
    eprintln!("       [--drop-every BYTES] [--seed N] [--control]");
    exit(2);
}
