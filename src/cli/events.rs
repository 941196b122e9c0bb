//! `plyfs events`: the events of bases and caches.

use std::cell::Cell;

use serde_json::Value;

use super::Global;
use super::client::{Client, read};
use super::error::CliError;
use super::output::{Reader, print_on, printable};
use super::retry::{self, Delivery};
use crate::config::size::format_size;
use crate::control::wire;

const EXAMPLES: &str = "\
Examples:
  plyfs events                                      recent events
  plyfs events --follow                             new events, until interrupted
  plyfs --json events --follow | jq 'select(.event == \"base.waiting\")'

Bytes found in a cache, fetched and evicted are summed up: one line a second for each base and reason. With --json and \
--follow each line is an object. A reader that is too slow loses events; a line `lost` says how many. The command \
continues when another worker takes over; it ends when the daemon does, with status 1.";

/// Show the events of bases and caches: hits, misses, evictions, servers that do not answer
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Events {
    /// Print new events instead, until interrupted
    #[arg(long, short)]
    follow: bool,
}

impl Events {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let client = global.client()?;
        if self.follow { follow(&client, global.json) } else { recent(&client, global) }
    }
}

fn recent(client: &Client, global: &Global) -> Result<(), CliError> {
    let action = "cannot get the events";
    let recent = retry::repeat(|| {
        let mut events = Vec::new();
        client.lines("/v1/events", action, |text| {
            events.push(parse(text, action)?);
            Ok(())
        })?;
        Ok(Value::Array(events))
    })?;
    let events: Vec<wire::Event> = read(&recent, action)?;
    global.output().value(&recent, |_| events.iter().map(human).collect())
}

fn follow(client: &Client, json: bool) -> Result<(), CliError> {
    let action = "cannot follow events";
    // Worker and number of the last event.
    let mut last: Option<(u32, u64)> = None;
    let gone = Cell::new(false);
    let ended = retry::follow(|| {
        let mut delivery = Delivery::None;
        let path = match last {
            None => "/v1/events?follow=true".to_owned(),
            Some((worker, number)) => format!("/v1/events?follow=true&after={number}&worker={worker}"),
        };
        let done = client.lines(&path, action, |text| {
            let value = parse(text, action)?;
            delivery = Delivery::Some;
            let event: wire::Event = read(&value, action)?;
            if let Some(number) = event.number {
                last = Some((event.worker, number));
            }
            if event.event == "following" {
                return Ok(());
            }
            let line = if json { format!("{value}\n") } else { human(&event) };
            if print_on(&line)? == Reader::Gone {
                gone.set(true);
                return Err(client.transport(action, "the reader of the output is gone".to_owned()));
            }
            Ok(())
        });
        let done = match done {
            _ if gone.get() => Ok(()),
            // The worker was told to end; the next one serves.
            Ok(()) => Err(client.transport(action, "the worker ended".to_owned())),
            failed => failed,
        };
        (delivery, done)
    });
    match ended {
        Err(CliError::Transport { .. }) if last.is_some() && !client.is_listening() => {
            Err(CliError::Ended { store: client.store().to_owned() })
        }
        other => other,
    }
}

fn parse(text: &str, action: &str) -> Result<Value, CliError> {
    serde_json::from_str(text).map_err(|error| CliError::InvalidAnswer {
        action: action.to_owned(),
        problem: format!("the daemon's answer is not JSON ({error})"),
    })
}

/// One line. An absent field is omitted, except the base or disk, so that columns stay aligned.
pub(super) fn human(event: &wire::Event) -> String {
    if event.event == "lost" {
        return format!("lost {} events: this reader is too slow\n", event.count.unwrap_or(0));
    }
    let text = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), printable);
    let at = text(&event.at);
    // Milliseconds are enough for people.
    let at = at.split_once('.').map_or(at.clone(), |(whole, part)| format!("{whole}.{:.3}Z", part));
    let mut line = format!(
        "{at}  {:<15}  {}",
        printable(&event.event),
        text(event.base.as_ref().map_or(&event.disk, |_| &event.base))
    );
    if let Some(bytes) = event.bytes {
        line += &format!("  {}", format_size(bytes));
    }
    if let Some(count) = event.count {
        line += &format!(" in {count}");
    }
    if event.reason.is_some() {
        line += &format!("  {}", text(&event.reason));
    }
    if event.since.is_some() {
        line += &format!("  since {}", text(&event.since));
    }
    line + "\n"
}
