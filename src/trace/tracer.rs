//! Which boots are recorded, and what becomes of the recordings.
//!
//! A base without a trace gets one from the first boot: of all disks on it that were never written to, the first of
//! which what it read looks like a boot when it ends. A look at a partition table is too little, a copy of the disk
//! jumps too rarely. Whoever asks for a recording gets it, whatever it is.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use parking_lot::Mutex;

use super::tap::{Arm, Slot};
use super::{End, Limits, Player, Recorder, Tap, TraceStore};
use crate::events::{Event, Events, Kind};
use crate::format::BLOCK;
use crate::format::trace::{Origin, Trace};
use crate::io::sys;

/// A recording of less is no boot.
const SMALLEST_BOOT: u64 = 1 << 20;
/// Whoever reads so many bytes between two jumps copies.
const COPY: u64 = 1 << 20;

/// Whether first boots are recorded without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Automatic {
    /// They are.
    Yes,
    /// Only who asks gets a recording.
    No,
}

/// The base of a recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Its number.
    pub base: u64,
    /// Its name.
    pub name: String,
    /// Bytes of its virtual disk.
    pub size: u64,
    /// Which image it is.
    pub origin: Origin,
}

struct Session {
    subject: Subject,
    taps: Vec<Weak<Tap>>,
    how: How,
}

enum How {
    /// Somebody asked for a recording of the only tap's disk.
    Asked(Arc<Recorder>),
    /// The first boot of any of the taps' disks.
    Automatic(Arc<Arm>),
}

/// A recording that has ended and is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Number of the base.
    pub base: u64,
    /// Its name.
    pub name: String,
    /// Entries of the trace.
    pub entries: usize,
    /// Bytes that they name.
    pub bytes: u64,
    /// Milliseconds from the first to the last.
    pub duration_ms: u32,
    /// Why it ended.
    pub end: End,
}

/// Why a recording cannot begin, or cannot end well.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// One is under way for this base.
    #[error("a recording of base {base} by disk number {disk} is under way")]
    UnderWay {
        /// The base.
        base: String,
        /// The disk.
        disk: u64,
    },
    /// This disk is not being recorded.
    #[error("nothing is being recorded")]
    None,
    /// The disk did not read anything of its base.
    #[error("nothing was read from the base")]
    Empty,
    /// It could not be kept.
    #[error("the trace cannot be saved: {0}")]
    Io(#[from] io::Error),
}

/// See the module.
pub struct Tracer {
    store: TraceStore,
    limits: Limits,
    automatic: Automatic,
    events: Events,
    sessions: Mutex<Vec<Session>>,
    /// Bases that have a trace, readable or not.
    known: Mutex<BTreeSet<u64>>,
    prefetch: OnceLock<Prefetch>,
}

/// Given the number of a base that has a trace and begins to be read. Must not wait.
type Prefetch = Arc<dyn Fn(u64) + Send + Sync>;

impl Tracer {
    /// With the traces that are in the store.
    pub fn new(store: TraceStore, limits: Limits, automatic: Automatic, events: Events) -> Self {
        let known = store.bases().unwrap_or_else(|error| {
            tracing::warn!(%error, "the traces in the store cannot be listed");
            Vec::new()
        });
        let known = Mutex::new(known.into_iter().collect());
        let (sessions, prefetch) = (Mutex::default(), OnceLock::new());
        Self { store, limits, automatic, events, sessions, known, prefetch }
    }

    /// The traces in the store. To change them use [`save`](Self::save) and [`remove`](Self::remove).
    pub fn store(&self) -> &TraceStore {
        &self.store
    }

    /// From now on `prefetch` is told when a disk whose base has a trace is read for the first time.
    pub fn prefetch_with(&self, prefetch: impl Fn(u64) + Send + Sync + 'static) {
        let _ = self.prefetch.set(Arc::new(prefetch));
    }

    /// A disk is there to be read. When it was never written to and its base has no trace, its first boot may become
    /// that; when there is a trace, it is played at the first read. Does not wait.
    pub fn attached(&self, tap: &Arc<Tap>, written: bool, subject: &Subject) {
        if let Some(prefetch) = self.prefetch.get()
            && self.known.lock().contains(&subject.base)
        {
            let (prefetch, base) = (prefetch.clone(), subject.base);
            tap.at_first_read(Box::new(move || prefetch(base)));
            return;
        }
        if self.automatic == Automatic::No || written || self.known.lock().contains(&subject.base) {
            return;
        }
        let mut sessions = self.sessions.lock();
        let at = sessions.iter().position(|session| session.subject.base == subject.base);
        let at = at.unwrap_or_else(|| {
            let how = How::Automatic(Arc::new(Arm::new(subject.size, self.limits)));
            sessions.push(Session { subject: subject.clone(), taps: Vec::new(), how });
            sessions.len() - 1
        });
        let session = &mut sessions[at];
        if let How::Automatic(arm) = &session.how {
            tap.set(Slot::Armed(arm.clone()));
            session.taps.retain(|other| other.strong_count() > 0 && other.as_ptr() != Arc::as_ptr(tap));
            session.taps.push(Arc::downgrade(tap));
        }
    }

    /// Records what a disk reads from now on as the trace of its base.
    ///
    /// # Errors
    /// `UnderWay` when somebody asked for a recording of this base before.
    pub fn record(&self, tap: &Arc<Tap>, subject: Subject) -> Result<(), RecordError> {
        let mut sessions = self.sessions.lock();
        if let Some(at) = sessions.iter().position(|session| session.subject.base == subject.base) {
            if matches!(sessions[at].how, How::Asked(_)) {
                let disk = sessions[at].taps.first().and_then(Weak::upgrade).map_or(0, |tap| tap.disk());
                return Err(RecordError::UnderWay { base: subject.name, disk });
            }
            sessions.remove(at).close();
        }
        let recorder = Arc::new(Recorder::new(subject.size, self.limits));
        tap.set(Slot::Recording(recorder.clone()));
        sessions.push(Session { subject, taps: vec![Arc::downgrade(tap)], how: How::Asked(recorder) });
        Ok(())
    }

    /// Ends a recording that was asked for, or one that began by itself, of what this disk reads, and keeps it. May
    /// wait for the store.
    ///
    /// # Errors
    /// `None` when there is none, `Empty` when the disk has read nothing, `Io` when it cannot be kept.
    pub fn stop(&self, disk: u64) -> Result<Recorded, RecordError> {
        let (session, recorder) = {
            let mut sessions = self.sessions.lock();
            let found = sessions.iter().enumerate().find_map(|(at, session)| {
                session
                    .recorders()
                    .into_iter()
                    .find(|(of, _)| *of == disk)
                    .map(|(_, recorder)| (at, recorder))
            });
            let (at, recorder) = found.ok_or(RecordError::None)?;
            (sessions.remove(at), recorder)
        };
        session.close();
        recorder.end(End::Asked);
        self.keep(&session.subject, &recorder, End::Asked)
    }

    /// Whether there is anything to do for [`tick`](Self::tick).
    pub fn is_recording(&self) -> bool {
        !self.sessions.lock().is_empty()
    }

    /// Numbers of the disks that are being recorded.
    pub fn recording(&self) -> Vec<u64> {
        self.sessions.lock().iter().flat_map(Session::recorders).map(|(disk, _)| disk).collect()
    }

    /// Keeps the recordings that have ended. To be called every second or so; may wait for the store.
    pub fn tick(&self, now: Instant) {
        let mut kept = Vec::new();
        self.sessions.lock().retain(|session| {
            // A base that was removed, or whose disks were.
            if session.taps.iter().all(|tap| tap.strong_count() == 0) {
                return false;
            }
            let ended = session
                .recorders()
                .into_iter()
                .filter_map(|(disk, recorder)| recorder.ended(now).map(|end| (disk, recorder, end)));
            for (disk, recorder, end) in ended {
                match &session.how {
                    How::Automatic(arm) if !is_a_boot(&recorder, end) => {
                        let slot =
                            if is_a_copy(&recorder, end) { Slot::Closed } else { Slot::Armed(arm.clone()) };
                        arm.end(disk);
                        session.tap_of(disk).into_iter().for_each(|tap| tap.set(slot.clone()));
                    }
                    _ => {
                        session.close();
                        kept.push((session.subject.clone(), recorder, end));
                        return false;
                    }
                }
            }
            true
        });
        for (subject, recorder, end) in kept {
            self.keep_or_say(&subject, &recorder, end);
        }
    }

    /// Keeps what is being recorded: the worker ends. May wait for the store.
    pub fn close(&self) {
        let sessions = std::mem::take(&mut *self.sessions.lock());
        for session in sessions {
            session.close();
            for (_, recorder) in session.recorders() {
                recorder.end(End::Asked);
                if matches!(session.how, How::Asked(_)) || is_a_boot(&recorder, End::Asked) {
                    self.keep_or_say(&session.subject, &recorder, End::Asked);
                    break;
                }
            }
        }
    }

    fn keep_or_say(&self, subject: &Subject, recorder: &Recorder, end: End) {
        match self.keep(subject, recorder, end) {
            Ok(_) | Err(RecordError::Empty) => {}
            Err(error) => tracing::warn!(base = subject.name, %error, "a recording is lost"),
        }
    }

    fn keep(&self, subject: &Subject, recorder: &Recorder, end: End) -> Result<Recorded, RecordError> {
        let Subject { base, name, size, origin } = subject.clone();
        let entries = recorder.entries();
        if entries.is_empty() {
            return Err(RecordError::Empty);
        }
        let trace = Trace { base: name.clone(), size, origin, recorded_ns: sys::now_ns(), entries };
        self.save(base, &trace)?;
        let bytes = trace.blocks() * BLOCK;
        let count = trace.entries.len();
        let event = Event::of_base(Kind::TraceRecorded, &name).bytes(bytes).count(count as u64);
        self.events.emit(event);
        tracing::info!(base = name, entries = count, bytes, ?end, "a trace was recorded");
        Ok(Recorded { base, name, entries: count, bytes, duration_ms: trace.duration_ms(), end })
    }

    /// Keeps a trace as that of a base.
    ///
    /// # Errors
    /// As [`TraceStore::save`].
    pub fn save(&self, base: u64, trace: &Trace) -> io::Result<()> {
        self.store.save(base, trace)?;
        self.known.lock().insert(base);
        Ok(())
    }

    /// Drops the trace of a base; false when it has none. The next first boot is recorded.
    ///
    /// # Errors
    /// As [`TraceStore::remove`].
    pub fn remove(&self, base: u64) -> io::Result<bool> {
        let removed = self.store.remove(base)?;
        self.known.lock().remove(&base);
        Ok(removed)
    }

    /// What to fetch for a boot on this base, when there is a trace for it. Reads the store.
    pub fn player(&self, subject: &Subject) -> Option<Player> {
        if !self.known.lock().contains(&subject.base) {
            return None;
        }
        match self.store.load(subject.base) {
            Ok(Some(trace)) if trace.size == subject.size && !trace.origin.contradicts(&subject.origin) => {
                Some(Player::new(&trace, subject.size))
            }
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(base = subject.name, %error, "the trace is not used");
                None
            }
        }
    }
}

impl Session {
    /// Nothing more is noted.
    fn close(&self) {
        for tap in self.taps.iter().filter_map(Weak::upgrade) {
            tap.set(Slot::Closed);
        }
    }

    fn tap_of(&self, disk: u64) -> Option<Arc<Tap>> {
        self.taps.iter().filter_map(Weak::upgrade).find(|tap| tap.disk() == disk)
    }

    /// Which disks are being recorded.
    fn recorders(&self) -> Vec<(u64, Arc<Recorder>)> {
        match &self.how {
            How::Automatic(arm) => arm.running(),
            How::Asked(recorder) => {
                let disk = self.taps.first().and_then(Weak::upgrade).map(|tap| tap.disk());
                disk.map(|disk| (disk, recorder.clone())).into_iter().collect()
            }
        }
    }
}

/// Somebody reads all of a disk, from one end to the other.
fn is_a_copy(recorder: &Recorder, end: End) -> bool {
    let entries = recorder.entries();
    let jumps = entries.windows(2).filter(|pair| pair[0].first + pair[0].blocks != pair[1].first).count();
    matches!(end, End::Bytes | End::Entries) || recorder.bytes() / (jumps as u64 + 1) >= COPY
}

fn is_a_boot(recorder: &Recorder, end: End) -> bool {
    recorder.bytes() >= SMALLEST_BOOT && !is_a_copy(recorder, end)
}
