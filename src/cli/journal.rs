//! Priorities in the journal: when standard error is the journal's socket, each line begins with `<N>`, which journald
//! takes as the priority of the line. Source: sd-daemon(3); systemd.exec(5), `JOURNAL_STREAM`.

use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Set by systemd: device and inode of the socket, in decimal.
const STREAM_ENV: &str = "JOURNAL_STREAM";

/// Whether standard error is the journal's socket. The variable alone does not say so: a child of a service may have
/// another standard error.
pub(super) fn is_connected() -> bool {
    let stream = std::env::var(STREAM_ENV).unwrap_or_default();
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|meta| names(&stream, meta.dev(), meta.ino()))
}

fn names(stream: &str, device: u64, inode: u64) -> bool {
    let numbers = stream.split_once(':').and_then(|(d, i)| Some((d.parse().ok()?, i.parse().ok()?)));
    numbers == Some((device, inode))
}

/// What a line of this level begins with.
pub(super) fn prefix(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        Level::DEBUG | Level::TRACE => "<7>",
    }
}

/// Makes writers to standard error that begin each event with its priority.
pub(super) struct Journal;

impl<'a> MakeWriter<'a> for Journal {
    type Writer = Prefixed<io::Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        Prefixed { prefix: prefix(Level::INFO), to: io::stderr() }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Self::Writer {
        Prefixed { prefix: prefix(*meta.level()), to: io::stderr() }
    }
}

/// Writes each line with a prefix, an event with one system call: lines of several processes do not mix.
pub(super) struct Prefixed<W> {
    prefix: &'static str,
    to: W,
}

impl<W: Write> Write for Prefixed<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let mut text = Vec::with_capacity(event.len() + self.prefix.len());
        for line in event.split_inclusive(|byte| *byte == b'\n') {
            text.extend_from_slice(self.prefix.as_bytes());
            text.extend_from_slice(line);
        }
        self.to.write_all(&text)?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_socket_that_the_variable_names_is_the_journal() {
        assert!(names("8:4711", 8, 4711));
        for stream in ["", "8", "8:", ":4711", "8:4712", "9:4711", "x:y"] {
            assert!(!names(stream, 8, 4711), "{stream}");
        }
    }

    #[test]
    fn each_line_of_an_event_has_the_priority_of_its_level() {
        let mut out = Prefixed { prefix: prefix(Level::WARN), to: Vec::new() };
        out.write_all(b"one\ntwo\n").expect("memory");
        assert_eq!(String::from_utf8_lossy(&out.to), "<4>one\n<4>two\n");
        let levels = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];
        assert_eq!(levels.map(prefix), ["<3>", "<4>", "<6>", "<7>", "<7>"]);
    }
}
