//! Traces in the store: one file for each base that has one, `traces/N.trace`.
//!
//! A trace only makes a boot faster. An unreadable trace counts as none, and the error is reported.

use std::io;
use std::sync::Arc;

use crate::format::layout::{TRACE_SUFFIX, TRACES, trace_file};
use crate::format::trace::{MAX_FILE, Trace};
use crate::io::{Medium, Open, read_whole, replace};

/// A trace file in the store.
#[derive(Debug)]
pub struct SavedTrace {
    /// Number of its base.
    pub base: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// The trace, or why it cannot be used.
    pub trace: Result<Trace, String>,
}

/// See the module.
#[derive(Clone)]
pub struct TraceStore {
    medium: Arc<dyn Medium>,
}

impl TraceStore {
    /// The traces of the store on this medium.
    pub fn new(medium: Arc<dyn Medium>) -> Self {
        Self { medium }
    }

    /// Saves the trace of a base durably, and replaces the earlier one.
    ///
    /// # Errors
    /// `InvalidInput` for an invalid trace; errors of the storage.
    pub fn save(&self, base: u64, trace: &Trace) -> io::Result<()> {
        let bytes = trace.encode().map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        // A store of a version without traces has no such directory.
        self.medium.make_dir(TRACES)?;
        self.medium.sync_dir(".")?;
        replace(&*self.medium, TRACES, &trace_file(base), &bytes)
    }

    /// The trace of a base, if it has one.
    ///
    /// # Errors
    /// `InvalidData` for a file that is no trace; errors of the storage.
    pub fn load(&self, base: u64) -> io::Result<Option<Trace>> {
        self.bytes(base)?.map(|bytes| decode(&bytes)).transpose()
    }

    /// The bytes of a base's trace file, if there is one.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn bytes(&self, base: u64) -> io::Result<Option<Vec<u8>>> {
        match self.medium.open(&format!("{TRACES}/{}", trace_file(base)), Open::Existing) {
            Ok(file) => read_whole(&*file, MAX_FILE).map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Numbers of the bases that have a trace.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn bases(&self) -> io::Result<Vec<u64>> {
        let names = match self.medium.list(TRACES) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            names => names?,
        };
        let number = |name: &String| name.strip_suffix(TRACE_SUFFIX).and_then(|number| number.parse().ok());
        let mut numbers: Vec<u64> = names.iter().filter_map(number).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// All traces, by the number of the base.
    ///
    /// # Errors
    /// Errors of the storage when it lists the directory.
    pub fn list(&self) -> io::Result<Vec<SavedTrace>> {
        let mut out = Vec::new();
        for base in self.bases()? {
            let (file_bytes, trace) = match self.bytes(base) {
                Ok(Some(bytes)) => (bytes.len() as u64, decode(&bytes).map_err(|e| e.to_string())),
                Ok(None) => continue,
                Err(error) => (0, Err(error.to_string())),
            };
            out.push(SavedTrace { base, file_bytes, trace });
        }
        Ok(out)
    }

    /// Removes the trace of a base; false when it has none.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn remove(&self, base: u64) -> io::Result<bool> {
        match self.medium.remove(&format!("{TRACES}/{}", trace_file(base))) {
            Ok(()) => self.medium.sync_dir(TRACES).map(|()| true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }
}

fn decode(bytes: &[u8]) -> io::Result<Trace> {
    Trace::decode(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}
