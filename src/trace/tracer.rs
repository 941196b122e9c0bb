//! Which boots are recorded, and what becomes of the recordings.
//!
//! A base without a trace gets one from the first boot: the disk on it that was never written to and is the first to
//! read. What is not a boot is told from one when it ends: a look at a partition table is too little, a copy of the
//! disk jumps too rarely. Whoever asks for a recording gets it, whatever it is.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;

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
    recorder: Arc<Recorder>,
    taps: Vec<Weak<Tap>>,
    automatic: Automatic,
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
}

impl Tracer {
    /// With the traces that are in the store.
    pub fn new(store: TraceStore, limits: Limits, automatic: Automatic, events: Events) -> Self {
        let known = store.bases().unwrap_or_else(|error| {
            tracing::warn!(%error, "the traces in the store cannot be listed");
            Vec::new()
        });
        let known = Mutex::new(known.into_iter().collect());
        Self { store, limits, automatic, events, sessions: Mutex::default(), known }
    }

    /// The traces in the store. To change them use [`save`](Self::save) and [`remove`](Self::remove).
    pub fn store(&self) -> &TraceStore {
        &self.store
    }

    /// A disk is there to be read. When it was never written to and its base has no trace, its first boot may become
    /// that. Does not wait.
    pub fn attached(&self, tap: &Arc<Tap>, written: bool, subject: &Subject) {
        if self.automatic == Automatic::No || written || self.known.lock().contains(&subject.base) {
            return;
        }
        let mut sessions = self.sessions.lock();
        let session = match sessions.iter_mut().position(|session| session.subject.base == subject.base) {
            Some(at) => &mut sessions[at],
            None => {
                sessions.push(Session {
                    subject: subject.clone(),
                    recorder: Arc::new(Recorder::new(subject.size, self.limits)),
                    taps: Vec::new(),
                    automatic: Automatic::Yes,
                });
                sessions.last_mut().expect("just pushed")
            }
        };
        if session.automatic == Automatic::Yes {
            tap.set(Some(session.recorder.clone()));
            session.taps.retain(|tap| tap.strong_count() > 0);
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
            if sessions[at].automatic == Automatic::No {
                let disk = sessions[at].taps.first().and_then(Weak::upgrade).map_or(0, |tap| tap.disk());
                return Err(RecordError::UnderWay { base: subject.name, disk });
            }
            sessions.remove(at).close();
        }
        let recorder = Arc::new(Recorder::new(subject.size, self.limits));
        tap.set(Some(recorder.clone()));
        let taps = vec![Arc::downgrade(tap)];
        sessions.push(Session { subject, recorder, taps, automatic: Automatic::No });
        Ok(())
    }

    /// Ends a recording that was asked for, or one that began by itself, of what this disk reads, and keeps it. May
    /// wait for the store.
    ///
    /// # Errors
    /// `None` when there is none, `Empty` when the disk has read nothing, `Io` when it cannot be kept.
    pub fn stop(&self, disk: u64) -> Result<Recorded, RecordError> {
        let session = {
            let mut sessions = self.sessions.lock();
            let of_disk = |session: &Session| match session.automatic {
                Automatic::No => {
                    session.taps.iter().any(|tap| tap.upgrade().is_some_and(|tap| tap.disk() == disk))
                }
                Automatic::Yes => session.recorder.owner() == Some(disk),
            };
            let at = sessions.iter().position(of_disk).ok_or(RecordError::None)?;
            sessions.remove(at)
        };
        session.close();
        session.recorder.end(End::Asked);
        self.keep(&session, End::Asked)
    }

    /// Whether there is anything to do for [`tick`](Self::tick).
    pub fn is_recording(&self) -> bool {
        !self.sessions.lock().is_empty()
    }

    /// Numbers of the disks that are being recorded, that is that have read something.
    pub fn recording(&self) -> Vec<u64> {
        self.sessions.lock().iter().filter_map(|session| session.recorder.owner()).collect()
    }

    /// Keeps the recordings that have ended. To be called every second or so; may wait for the store.
    pub fn tick(&self, now: Instant) {
        let ended: Vec<(Session, End)> = {
            let mut sessions = self.sessions.lock();
            let mut out = Vec::new();
            let mut at = 0;
            while at < sessions.len() {
                // A base that was removed, or whose disks were.
                if sessions[at].taps.iter().all(|tap| tap.strong_count() == 0) {
                    sessions.remove(at);
                } else if let Some(end) = sessions[at].recorder.ended(now) {
                    out.push((sessions.remove(at), end));
                } else {
                    at += 1;
                }
            }
            out
        };
        for (session, end) in ended {
            self.end(session, end);
        }
    }

    /// Keeps what is being recorded: the worker ends. May wait for the store.
    pub fn close(&self) {
        let sessions = std::mem::take(&mut *self.sessions.lock());
        for session in sessions {
            session.close();
            session.recorder.end(End::Asked);
            if session.automatic == Automatic::No || session.is_a_boot(End::Asked) {
                self.keep_or_say(&session, End::Asked);
            }
        }
    }

    fn end(&self, session: Session, end: End) {
        session.close();
        if session.automatic == Automatic::No || session.is_a_boot(end) {
            self.keep_or_say(&session, end);
            return;
        }
        // The next one that boots, then. Who copies now is not it.
        let owner = session.recorder.owner();
        let copies = end != End::Idle || session.recorder.bytes() >= SMALLEST_BOOT;
        for tap in session.taps.iter().filter_map(Weak::upgrade) {
            if !copies || Some(tap.disk()) != owner {
                self.attached(&tap, false, &session.subject);
            }
        }
    }

    fn keep_or_say(&self, session: &Session, end: End) {
        match self.keep(session, end) {
            Ok(_) | Err(RecordError::Empty) => {}
            Err(error) => tracing::warn!(base = session.subject.name, %error, "a recording is lost"),
        }
    }

    fn keep(&self, session: &Session, end: End) -> Result<Recorded, RecordError> {
        let Subject { base, name, size, origin } = session.subject.clone();
        let entries = session.recorder.entries();
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
            tap.set(None);
        }
    }

    fn is_a_boot(&self, end: End) -> bool {
        if matches!(end, End::Bytes | End::Entries) {
            return false;
        }
        let entries = self.recorder.entries();
        let jumps = entries.windows(2).filter(|pair| pair[0].first + pair[0].blocks != pair[1].first).count();
        let bytes = self.recorder.bytes();
        bytes >= SMALLEST_BOOT && bytes / (jumps as u64 + 1) < COPY
    }
}
