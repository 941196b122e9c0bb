//! Proves the bytes of one fetch while they come. The hashes may come later than the bytes, which wait for them here.

use std::ops::Range;

use tokio::runtime::Handle;
use tokio::sync::oneshot::{self, Receiver, error::TryRecvError};

use super::AbortOnDrop;
use super::answer::Failure;
use crate::source::{Disproven, Parts, ProofOfRange, Prover, SourceError};

type Outcome = Result<Parts, SourceError>;

/// See the module.
pub(in crate::source) struct Proving {
    prover: Prover,
    /// The hashes, until they came; and the task that brings them.
    coming: Option<(Receiver<Outcome>, AbortOnDrop<()>)>,
    lost: Option<SourceError>,
    disproven: Option<Disproven>,
}

impl Proving {
    /// Begins to bring the hashes of `range`.
    pub fn begin(runtime: &Handle, range: Range<u64>, proof: ProofOfRange) -> Self {
        let (say, outcome) = oneshot::channel();
        let ProofOfRange { unit, parts } = proof;
        let task = runtime.spawn(async move {
            let _ = say.send(parts.await);
        });
        let coming = Some((outcome, AbortOnDrop(task)));
        Self { prover: Prover::new(range, unit), coming, lost: None, disproven: None }
    }

    /// With the hashes of `range`.
    pub fn known(range: Range<u64>, parts: Parts) -> Self {
        let mut prover = Prover::new(range, parts.unit());
        prover.know(parts);
        Self { prover, coming: None, lost: None, disproven: None }
    }

    /// Where the bytes end that were delivered.
    pub fn at(&self) -> u64 {
        self.prover.at()
    }

    /// Another answer begins, at [`at`](Self::at).
    pub fn restart(&mut self) {
        self.prover.restart();
        self.disproven = None;
    }

    /// Why the hashes do not come, once.
    pub fn lost(&mut self) -> Option<SourceError> {
        self.lost.take()
    }

    /// The part that the last answer had wrong.
    pub fn disproven(&self) -> Option<Parts> {
        let wrong = self.disproven.as_ref()?;
        Some(self.prover.parts()?.only(wrong.range.start))
    }

    /// Takes the next bytes of an answer, and delivers what is proven. Returns the bytes that it delivered.
    pub fn take(&mut self, bytes: &[u8], deliver: &mut dyn FnMut(&[u8])) -> Result<usize, Failure> {
        self.prover.take(bytes);
        let came = self.coming.as_mut().map(|(outcome, _)| outcome.try_recv());
        match came {
            Some(Ok(outcome)) => self.came(outcome)?,
            Some(Err(TryRecvError::Closed)) => return Err(self.ended()),
            Some(Err(TryRecvError::Empty)) | None => {}
        }
        self.deliver(deliver)
    }

    /// Waits for the hashes of what came, and delivers what is proven. Returns the bytes that it delivered.
    pub async fn settle(&mut self, deliver: &mut (dyn FnMut(&[u8]) + Send)) -> Result<usize, Failure> {
        if self.prover.waits()
            && let Some((outcome, _)) = &mut self.coming
        {
            match outcome.await {
                Ok(outcome) => self.came(outcome)?,
                Err(_) => return Err(self.ended()),
            }
        }
        self.deliver(deliver)
    }

    fn came(&mut self, outcome: Outcome) -> Result<(), Failure> {
        self.coming = None;
        match outcome {
            Ok(parts) => self.prover.know(parts),
            Err(error) => {
                let why = error.to_string();
                self.lost = Some(error);
                return Err(Failure::again(why));
            }
        }
        Ok(())
    }

    /// The task ended without a result, as it does with its runtime.
    fn ended(&mut self) -> Failure {
        Failure::again("the request for its proof was cancelled")
    }

    fn deliver(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<usize, Failure> {
        self.prover.deliver(deliver).map_err(|wrong| {
            let why = wrong.why();
            self.disproven = Some(wrong);
            Failure::Disproven(why)
        })
    }
}
