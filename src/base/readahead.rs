//! Placeholder.
pub struct Readahead;
pub struct Advice {
    pub ranges: Vec<(u64, u64)>,
}
impl Readahead {
    pub fn new(_blocks: u64) -> Self {
        Self
    }
    pub fn read(
        &mut self,
        _first: u64,
        _count: u64,
        _missing: bool,
        _present: &dyn Fn(u64) -> bool,
    ) -> Advice {
        Advice { ranges: Vec::new() }
    }
}
