//! `plyfs disk diff`: which extents of a disk differ between two moments.

use serde_json::json;

use super::Global;
use super::args::{self, DiskOrSnapshot};
use super::client::{Client, read};
use super::error::CliError;
use super::output::{Reader, print_on};
use super::retry;
use crate::config::size::format_size;
use crate::control::wire::{DiskExtent, DiskExtents, ExtentContent};

pub(super) const EXAMPLES: &str = "\
Examples:
  plyfs disk diff vm1                    what the disk has in place of its base
  plyfs disk diff vm1@monday             what changed since the snapshot
  plyfs disk diff vm1@monday @tuesday    what changed between two snapshots
  plyfs disk diff vm1 @monday            what the snapshot has in place of the base
  plyfs --json disk diff vm1@monday | jq '[.extents[].length] | add'

Offsets and lengths are bytes. An extent is data, zeros, or shows the base again. It was written or discarded; it may \
have the same bytes as before. No data is read. The list of a disk that is in use has changes that are made meanwhile; \
take a snapshot for a fixed end.";

/// Extents of one request.
const PAGE: u32 = 10_000;

/// Parses the end of a comparison: `@SNAPSHOT` or `DISK@SNAPSHOT`. The disk may be empty.
pub(super) fn end(text: &str) -> Result<DiskOrSnapshot, String> {
    match text.split_once('@') {
        Some(("", snapshot)) => {
            Ok(DiskOrSnapshot { disk: String::new(), snapshot: Some(args::name(snapshot)?) })
        }
        Some(_) => args::disk_or_snapshot(text),
        None => Err(format!("it names no snapshot; give @{text} or DISK@{text}")),
    }
}

/// Prints what differs.
pub(super) fn run(
    global: &Global,
    from: &DiskOrSnapshot,
    end: Option<&DiskOrSnapshot>,
) -> Result<(), CliError> {
    if let Some(end) = end.filter(|end| !end.disk.is_empty() && end.disk != from.disk) {
        let why = format!(
            "cannot compare {from} with {end}: they are of two disks; name two snapshots of one disk, such as {from} @{}",
            end.snapshot.as_deref().unwrap_or_default()
        );
        return Err(CliError::Usage(why));
    }
    let until = end.and_then(|end| end.snapshot.as_deref());
    let moments = Moments { disk: &from.disk, since: from.snapshot.as_deref(), until };
    let client = global.client()?;
    let output = global.output();
    if output.is_json() {
        let mut all = DiskExtents::default();
        moments.each(&client, &format!("cannot compare {from}"), |mut part| {
            let mut extents = std::mem::take(&mut all.extents);
            part.extents.drain(..).for_each(|extent| push(&mut extents, extent));
            all = DiskExtents { extents, ..part };
            Ok(Reader::Present)
        })?;
        return output.value(&json!(all), |_| String::new());
    }
    let mut lines = Lines::default();
    let mut reader = print_on(&line("OFFSET", "LENGTH", "CONTENT"))?;
    if reader == Reader::Present {
        moments.each(&client, &format!("cannot compare {from}"), |part| {
            reader = print_on(&lines.of(&part.extents))?;
            Ok(reader)
        })?;
    }
    if reader == Reader::Present {
        print_on(&lines.end())?;
    }
    Ok(())
}

fn line(offset: &str, length: &str, content: &str) -> String {
    format!("{offset:>16} {length:>16}  {content}\n")
}

/// Adds an extent. Neighbours of one kind are one.
pub(super) fn push(extents: &mut Vec<DiskExtent>, extent: DiskExtent) {
    match extents.last_mut() {
        Some(last) if last.content == extent.content && last.offset + last.length == extent.offset => {
            last.length += extent.length;
        }
        _ => extents.push(extent),
    }
}

/// The lines of a table that is printed as its parts arrive.
#[derive(Default)]
struct Lines {
    /// It may continue in the next part.
    last: Vec<DiskExtent>,
    count: u64,
    data: u64,
    other: u64,
}

impl Lines {
    fn of(&mut self, extents: &[DiskExtent]) -> String {
        let mut all = std::mem::take(&mut self.last);
        extents.iter().for_each(|extent| push(&mut all, *extent));
        self.last.extend(all.pop());
        all.iter().map(|extent| self.one(extent)).collect()
    }

    fn one(&mut self, extent: &DiskExtent) -> String {
        self.count += 1;
        let content = match extent.content {
            ExtentContent::Data => "data",
            ExtentContent::Zero => "zero",
            ExtentContent::Base => "base",
        };
        *if extent.content == ExtentContent::Data { &mut self.data } else { &mut self.other } +=
            extent.length;
        line(&extent.offset.to_string(), &extent.length.to_string(), content)
    }

    fn end(mut self) -> String {
        let last: String = std::mem::take(&mut self.last).iter().map(|extent| self.one(extent)).collect();
        let noun = if self.count == 1 { "extent" } else { "extents" };
        let (data, other) = (format_size(self.data), format_size(self.other));
        format!("{last}{} {noun}: {data} of data, {other} of zeros or base\n", self.count)
    }
}

/// Two moments of a disk.
pub(super) struct Moments<'a> {
    pub disk: &'a str,
    /// The earlier one: a snapshot; `None`: the base.
    pub since: Option<&'a str>,
    /// The later one: a snapshot; `None`: now.
    pub until: Option<&'a str>,
}

impl Moments<'_> {
    /// Calls `each` with each part of what differs, in order, until its reader is gone.
    pub(super) fn each(
        &self,
        client: &Client,
        action: &str,
        mut each: impl FnMut(DiskExtents) -> Result<Reader, CliError>,
    ) -> Result<(), CliError> {
        let named = [("since", self.since), ("until", self.until)];
        let named: String =
            named.iter().filter_map(|(key, name)| Some(format!("&{key}={}", (*name)?))).collect();
        let mut start = Some(0);
        while let Some(at) = start {
            let path = format!("/v1/disks/{}/extents?limit={PAGE}&start={at}{named}", self.disk);
            let part: DiskExtents = read(&retry::repeat(|| client.get(&path, action))?, action)?;
            start = part.next;
            if start.is_some_and(|next| next <= at) {
                let problem = "the daemon's answer repeats itself".to_owned();
                return Err(CliError::InvalidAnswer { action: action.to_owned(), problem });
            }
            if each(part)? == Reader::Gone {
                return Ok(());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, length: u64, content: ExtentContent) -> DiskExtent {
        DiskExtent { offset, length, content }
    }

    #[test]
    fn an_extent_that_continues_in_the_next_part_is_one_line() {
        let mut lines = Lines::default();
        let first =
            lines.of(&[extent(0, 4096, ExtentContent::Zero), extent(8192, 4096, ExtentContent::Data)]);
        assert_eq!(first, line("0", "4096", "zero"));
        assert_eq!(lines.of(&[]), "");
        assert_eq!(lines.of(&[extent(12288, 4096, ExtentContent::Data)]), "");
        let end = lines.end();
        assert_eq!(end, line("8192", "8192", "data") + "2 extents: 8K of data, 4K of zeros or base\n");
    }

    #[test]
    fn the_end_of_a_comparison_is_a_snapshot() {
        assert_eq!(end("@b").map(|end| end.to_string()), Ok("@b".into()));
        assert_eq!(end("vm1@b").map(|end| end.to_string()), Ok("vm1@b".into()));
        assert!(end("b").is_err_and(|why| why.contains("@b")));
        assert!(end("@").is_err());
    }
}
