//! Traces in the store: one file for each base that has one, `traces/N.trace`.
//!
//! A trace is worth a faster boot and nothing else: one that cannot be read is as good as none, and is said to be so.

use std::io;
use std::sync::Arc;

use crate::format::layout::{TRACE_SUFFIX, TRACES, trace_file};
use crate::format::trace::{MAX_FILE, Trace};
use crate::io::{Medium, Open, read_whole, replace};

/// A trace that is in the store.
#[derive(Debug)]
pub struct Saved {
    /// Number of its base.
    pub base: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// What is in it, or why it is of no use.
    pub trace: Result<Trace, String>,
}

/// See the module.
#[derive(Clone)]
pub struct TraceStore {
    medium: Arc<dyn Medium>,
}

impl TraceStore {
    /// In the store on this medium.
    pub fn new(medium: Arc<dyn Medium>) -> Self {
        Self { medium }
    }

    /// Keeps the trace of a base, durably, instead of the one that it has.
    ///
    /// # Errors
    /// `InvalidInput` for a trace that is none; what the storage says.
    pub fn save(&self, base: u64, trace: &Trace) -> io::Result<()> {
        let bytes = trace.encode().map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        // Stores of versions without traces do not have the directory.
        self.medium.make_dir(TRACES)?;
        self.medium.sync_dir(".")?;
        replace(&*self.medium, TRACES, &trace_file(base), &bytes)
    }

    /// The trace of a base, if it has one.
    ///
    /// # Errors
    /// `InvalidData` for a file that is no trace; what the storage says.
    pub fn load(&self, base: u64) -> io::Result<Option<Trace>> {
        self.bytes(base)?.map(|bytes| decode(&bytes)).transpose()
    }

    /// The file of a base's trace as it is, if there is one.
    ///
    /// # Errors
    /// What the storage says.
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
    /// What the storage says.
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
    /// What the storage says of the directory.
    pub fn list(&self) -> io::Result<Vec<Saved>> {
        let mut out = Vec::new();
        for base in self.bases()? {
            let (file_bytes, trace) = match self.bytes(base) {
                Ok(Some(bytes)) => (bytes.len() as u64, decode(&bytes).map_err(|e| e.to_string())),
                Ok(None) => continue,
                Err(error) => (0, Err(error.to_string())),
            };
            out.push(Saved { base, file_bytes, trace });
        }
        Ok(out)
    }

    /// Drops the trace of a base; false when it has none.
    ///
    /// # Errors
    /// What the storage says.
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
