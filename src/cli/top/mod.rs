//! `plyfs top`: what disks, bases and servers do at the moment.
//!
//! What must hold: a daemon that does not answer leaves the last numbers on the screen, with their age, and the keys go
//! on working. So a thread of its own asks the daemon.

mod app;
mod sample;
#[cfg(test)]
mod tests;
mod view;

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use ratatui::crossterm::event;
use serde_json::Value;
use terminal_size::{Width, terminal_size_of};

use self::app::{App, Tab, Then};
use self::sample::{Frame, Sample};
use super::Global;
use super::args;
use super::client::{Client, read};
use super::error::CliError;
use super::interrupt::Interrupts;
use super::listing::{Choice, Noun, no_notes};
use super::output::{Reader, print_on};
use super::retry;
use super::table::{cut, table};

const EXAMPLES: &str = "\
Examples:
  plyfs top
  plyfs top --sort write/s:desc --filter base=debian
  plyfs top --once
  plyfs top --batch 10 --interval 5s
  plyfs --json top --batch 3 | jq .total

Keys: q quits, p pauses, Tab changes between disks, bases and servers, < and > choose the column to sort by, r turns the \
order, / filters (part of a name, COLUMN=VALUE or COLUMN~TEXT), arrows and Page keys scroll, + and - change the interval, \
? shows the keys.

Numbers are of the interval before. HIT% is the share of the bytes read from bases that a cache had. The counters of a \
worker begin at 0; a frame after a change of the worker says so. With --json each frame is a line.";

/// The time that the daemon has for one answer.
const PATIENCE: Duration = Duration::from_secs(4);
/// How often keys are looked for.
const KEYS: Duration = Duration::from_millis(100);
const SHORTEST: u32 = 1;
const LONGEST: u32 = 60;

/// Show what disks, bases and servers do at the moment
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Top {
    /// Time between two frames
    #[arg(long, short, value_name = "TIME", default_value = "2s", value_parser = args::seconds)]
    interval: u32,
    /// Print N frames as plain text, and end
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    batch: Option<u64>,
    /// Print one frame as plain text, and end
    #[arg(long, conflicts_with = "batch")]
    once: bool,
    /// Most rows of each table in plain text
    #[arg(long, value_name = "N")]
    rows: Option<usize>,
    #[command(flatten)]
    choice: Choice,
}

const DISKS: Noun = Noun {
    names: ["disk", "disks"],
    name: "name",
    columns: &sample::DISKS,
    more: &[],
    totals: &[],
    notes: no_notes,
};
const BASES: Noun = Noun {
    names: ["base", "bases"],
    name: "name",
    columns: &sample::BASES,
    more: &[],
    totals: &[],
    notes: no_notes,
};
const SERVERS: Noun = Noun {
    names: ["server", "servers"],
    name: "url",
    columns: &sample::SERVERS,
    more: &[],
    totals: &[],
    notes: no_notes,
};

/// The order of disks without `--sort`.
const BUSIEST: &str = "operations_per_second:desc";

impl Top {
    pub(super) fn run(mut self, global: &Global) -> Result<(), CliError> {
        self.choice.sort_by_default(BUSIEST);
        self.choice.check(&DISKS)?;
        let frames = if self.once { Some(1) } else { self.batch };
        if frames.is_some() || global.json {
            return self.batch(global, frames.unwrap_or(u64::MAX));
        }
        if !(std::io::stdout().is_terminal() && std::io::stdin().is_terminal()) {
            let why = "standard input or output is no terminal; give --once, --batch N or --json";
            return Err(CliError::Usage(format!("plyfs top: {why}")));
        }
        self.interactive(global)
    }

    fn interval(&self) -> Duration {
        Duration::from_secs(self.interval.into())
    }

    fn batch(&self, global: &Global, frames: u64) -> Result<(), CliError> {
        let client = global.client()?;
        let interrupts = Interrupts::catch();
        let mut before = look(&client)?;
        for number in 0..frames {
            if let Some(signal) = interrupts.pause(self.interval()) {
                return Err(ended(signal));
            }
            // While one worker ends and the next one begins, frames are longer.
            let now = retry::repeat(|| look(&client))?;
            let mut frame = Frame::between(&before, &now);
            frame.disks = self.choice.choose(frame.disks, &DISKS)?;
            before = now;
            let text = if global.json { json_line(&frame) } else { self.text(&frame, number > 0) };
            if print_on(&text)? == Reader::Gone {
                return Ok(());
            }
        }
        Ok(())
    }

    fn text(&self, frame: &Frame, is_further: bool) -> String {
        let width = terminal_size_of(std::io::stdout()).map(|(Width(width), _)| usize::from(width));
        let now = SystemTime::now();
        let mut out = if is_further { "\n".to_owned() } else { String::new() };
        for line in view::summary(frame) {
            out += &width.map_or_else(|| line.clone(), |width| cut(&line, width));
            out.push('\n');
        }
        for (rows, noun) in [(&frame.disks, &DISKS), (&frame.bases, &BASES), (&frame.servers, &SERVERS)] {
            if rows.is_empty() {
                continue;
            }
            let shown = rows.len().min(self.rows.unwrap_or(usize::MAX));
            out.push('\n');
            out += &table(&Value::from(rows[..shown].to_vec()), noun.columns, now, width);
            if shown < rows.len() {
                out += &format!("{} more {}\n", rows.len() - shown, noun.names[1]);
            }
        }
        out
    }

    fn interactive(self, global: &Global) -> Result<(), CliError> {
        let client = global.client()?;
        // An error before the first frame is a message, and no screen.
        let first = look(&client)?;
        let interval = Arc::new(Mutex::new(self.interval()));
        let (frames, of_thread) = (sync_channel(1), Arc::clone(&interval));
        let (sender, receiver) = frames;
        let thread = thread::Builder::new().name("sampler".into());
        thread.spawn(move || sample(&client, first, &of_thread, &sender)).map_err(CliError::Runtime)?;
        let interrupts = Interrupts::catch();
        let mut app = App::new(self.choice, self.interval);
        let mut terminal = ratatui::try_init().map_err(CliError::Stdout)?;
        let shown = show(&mut terminal, &mut app, &receiver, &interval, &interrupts);
        ratatui::restore();
        shown
    }
}

/// The error of a command that a signal ended.
fn ended(signal: i32) -> CliError {
    CliError::Interrupted { message: "plyfs top: ended by a signal".to_owned(), signal }
}

fn json_line(frame: &Frame) -> String {
    // The frame has text keys only, so it always encodes.
    serde_json::to_string(frame).unwrap_or_default() + "\n"
}

/// Looks at all counters once.
fn look(client: &Client) -> Result<Sample, CliError> {
    let action = "cannot get the counters";
    let get = |path| client.get_within(PATIENCE, path, action);
    let stats = read(&get("/v1/stats")?, action)?;
    let at = Instant::now();
    let (disks, bases) = (read(&get("/v1/disks")?, action)?, read(&get("/v1/bases")?, action)?);
    Ok(Sample { at, time: SystemTime::now(), stats, disks, bases })
}

/// Sends a frame or an error in each interval, until the receiver is gone.
fn sample(
    client: &Client,
    mut before: Sample,
    interval: &Mutex<Duration>,
    frames: &SyncSender<Result<Frame, CliError>>,
) {
    loop {
        // In small steps, because the interval may change meanwhile.
        let begun = Instant::now();
        while begun.elapsed() < *interval.lock() {
            thread::sleep(KEYS);
        }
        let frame = look(client).map(|now| {
            let frame = Frame::between(&before, &now);
            before = now;
            frame
        });
        if frames.send(frame).is_err() {
            return;
        }
    }
}

/// Draws frames and takes keys until the user quits.
fn show(
    terminal: &mut ratatui::DefaultTerminal,
    app: &mut App,
    frames: &Receiver<Result<Frame, CliError>>,
    interval: &Mutex<Duration>,
    interrupts: &Interrupts,
) -> Result<(), CliError> {
    loop {
        terminal.draw(|frame| view::draw(frame, app)).map_err(CliError::Stdout)?;
        if event::poll(KEYS).map_err(CliError::Stdout)?
            && app.event(&event::read().map_err(CliError::Stdout)?) == Then::Quit
        {
            return Ok(());
        }
        if let Some(signal) = interrupts.pause(Duration::ZERO) {
            return Err(ended(signal));
        }
        *interval.lock() = Duration::from_secs(app.interval().into());
        match frames.recv_timeout(Duration::ZERO) {
            Ok(frame) => app.take(frame),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

impl Tab {
    fn noun(self) -> &'static Noun {
        match self {
            Self::Disks => &DISKS,
            Self::Bases => &BASES,
            Self::Servers => &SERVERS,
        }
    }
}
