//! Detects sequential reads: any number of interleaved streams, upwards or downwards.

/// Streams that are tracked at a time.
const STREAMS: usize = 32;
/// The fewest consecutive blocks of a stream, and the fewest reads: one large read is no stream.
const RUN: u64 = 64;
const READS: u32 = 3;
/// The farthest that all streams together are ahead, blocks. It bounds the memory.
const ALL_AHEAD: u64 = 2048;
/// A stream without a read among the last so many reads does not count any more.
const STALE: u64 = 256;
/// Blocks of a request when a stream is far enough ahead for more than one.
pub(super) const REQUEST: u64 = 64;

#[derive(Clone, Copy)]
struct Stream {
    /// The blocks that were read in a row: `low..high`.
    low: u64,
    high: u64,
    down: bool,
    reads: u32,
    /// How far it was fetched ahead: an end when it goes up, a beginning when it goes down.
    ahead: u64,
    /// The number of its last read.
    at: u64,
}

/// Whether a read belongs to a stream.
pub(super) enum Following {
    /// It does not, or the stream is too short yet: `run` blocks were read in a row, in this direction.
    No { run: u64, down: bool },
    /// It does. These ranges (first, end) are to be fetched, the nearest one first.
    Yes(Vec<(u64, u64)>),
}

/// See the module.
pub(super) struct Streams {
    streams: Vec<Stream>,
    reads: u64,
    longest: u64,
}

impl Streams {
    /// Streams that are fetched at most `longest` blocks ahead.
    pub(super) fn new(longest: u64) -> Self {
        Self { streams: Vec::new(), reads: 0, longest }
    }

    /// Notes that `first..end` was read.
    pub(super) fn read(&mut self, first: u64, end: u64) -> Following {
        self.reads += 1;
        let now = self.reads;
        // Reads of one stream may come out of order: from several readers, or from one with many reads under way.
        let slack = |s: &Stream| if s.high - s.low >= 2 * REQUEST { 2 * REQUEST } else { 0 };
        let found = self.streams.iter().position(|s| {
            let slack = slack(s);
            (first <= s.high + slack && end > s.high) || (end + slack >= s.low && first < s.low) || {
                // Inside the part that was read last: a repeated or late read. It neither moves nor ends the stream.
                first >= s.high.saturating_sub(slack + (end - first)) && end <= s.high && first >= s.low
            }
        });
        let Some(index) = found else {
            let new = Stream { low: first, high: end, down: false, reads: 1, ahead: end, at: now };
            if self.streams.len() < STREAMS {
                self.streams.push(new);
            } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|s| s.at) {
                *oldest = new;
            }
            return Following::No { run: end - first, down: false };
        };
        let stream = &mut self.streams[index];
        stream.at = now;
        if end > stream.high {
            if stream.down {
                (stream.down, stream.reads, stream.ahead) = (false, 1, end);
            }
            stream.high = end;
            stream.reads += 1;
        } else if first < stream.low {
            if !stream.down {
                (stream.down, stream.reads, stream.ahead) = (true, 1, first);
            }
            stream.low = first;
            stream.reads += 1;
        }
        let stream = *stream;
        let run = stream.high - stream.low;
        if run < RUN || stream.reads < READS {
            return Following::No { run, down: stream.down };
        }
        let going = self.streams.iter().filter(|s| s.reads >= READS && now - s.at < STALE).count() as u64;
        let window = (run / 2).min(self.longest).min((ALL_AHEAD / going.max(1)).max(REQUEST));
        // Far enough ahead, requests are aligned and of full size.
        let unit = if window > 2 * REQUEST { REQUEST } else { 1 };
        let least = REQUEST.min(window / 4);
        let mut ranges = Vec::new();
        if stream.down {
            let from = stream.ahead.min(stream.low);
            let to = stream.low.saturating_sub(window) / unit * unit;
            if to < from && (from - to >= least || to == 0) {
                self.streams[index].ahead = to;
                let mut end = from;
                while end > to {
                    let begin = to.max((end - 1) / REQUEST * REQUEST);
                    ranges.push((begin, end));
                    end = begin;
                }
            }
        } else {
            let from = stream.ahead.max(stream.high);
            let to = (stream.high + window).div_ceil(unit) * unit;
            if from < to && to - from >= least {
                self.streams[index].ahead = to;
                ranges.push((from, to));
            }
        }
        Following::Yes(ranges)
    }
}
