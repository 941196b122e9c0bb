//! Reads a file in the order in which a boot read its disk, one read after the other, without the page cache, and
//! prints how long that took.
//!
//!     replay-reads FILE READS [--compare FILE]
//!
//! READS has an offset and a length in bytes per line. The program prints
//! {"reads":N,"bytes":N,"seconds":S,"over_5_ms":N,"longest":S}. With `--compare` each read must return the bytes that
//! the other file has there; the seconds do not include the comparison.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::exit;
use std::time::{Duration, Instant};

/// The alignment of buffers for O_DIRECT.
const ALIGNMENT: usize = 4096;

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let (file, reads, compare) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [file, reads] => (file, reads, None),
        [file, reads, "--compare", other] => (file, reads, Some(other)),
        _ => {
            eprintln!("usage: replay-reads FILE READS [--compare FILE]");
            exit(2);
        }
    };
    if let Err(error) = run(file, reads, compare) {
        eprintln!("replay-reads: {error}");
        exit(1);
    }
}

fn run(file: &str, reads: &str, compare: Option<&str>) -> Result<(), String> {
    let reads =
        parse(&std::fs::read_to_string(reads).map_err(|error| format!("cannot read {reads}: {error}"))?)?;
    let open = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(file);
    let disk = open.map_err(|error| format!("cannot open {file}: {error}"))?;
    let other = compare.map(File::open).transpose().map_err(|error| format!("cannot open: {error}"))?;

    let longest_read = reads.iter().map(|(_, length)| *length).max().unwrap_or(0);
    let mut memory = vec![0; longest_read + ALIGNMENT];
    let skip = memory.as_ptr().align_offset(ALIGNMENT);
    let mut expected = vec![0; longest_read];
    let (mut total, mut longest, mut slow, mut bytes) = (Duration::ZERO, Duration::ZERO, 0, 0);
    for (offset, length) in &reads {
        let buffer = &mut memory[skip..skip + length];
        let begin = Instant::now();
        disk.read_exact_at(buffer, *offset)
            .map_err(|error| format!("{file}: {length} bytes at {offset}: {error}"))?;
        let took = begin.elapsed();
        total += took;
        longest = longest.max(took);
        slow += u32::from(took > Duration::from_millis(5));
        bytes += *length as u64;
        if let Some(other) = &other {
            other.read_exact_at(&mut expected[..*length], *offset).map_err(|error| error.to_string())?;
            if *buffer != expected[..*length] {
                return Err(format!("{file} differs from the other file at {offset}, length {length}"));
            }
        }
    }
    println!(
        r#"{{"reads":{},"bytes":{bytes},"seconds":{:.4},"over_5_ms":{slow},"longest":{:.4}}}"#,
        reads.len(),
        total.as_secs_f64(),
        longest.as_secs_f64()
    );
    Ok(())
}

fn parse(text: &str) -> Result<Vec<(u64, usize)>, String> {
    let line = |line: &str| {
        let (offset, length) = line.split_once(' ')?;
        Some((offset.parse().ok()?, length.parse().ok()?))
    };
    text.lines().map(|text| line(text).ok_or(format!("{text:?} is not an offset and a length"))).collect()
}
