//! Which thread runs a request.

use super::*;

/// A client that waits for each answer: the answer sends the next request from another thread.
struct Client {
    service: Service,
    disk: u64,
    /// The threads on which the answers came.
    threads: Mutex<Vec<String>>,
}

fn this_thread() -> String {
    std::thread::current().name().unwrap_or_default().to_owned()
}

impl Client {
    /// Writes a quarter of the disk at `offset`, and what follows, up to the end. Each write is sent while the answer to the
    /// one before is still being written: by then a client is awake. Durable ones may wait for the store on any medium.
    fn write(self: &Arc<Self>, offset: usize) {
        let (client, len) = (self.clone(), SIZE / 4);
        let answer = move |done: Result<(), Errno>| {
            assert_eq!(done.map_err(i32::from), Ok(()));
            client.threads.lock().push(this_thread());
            if offset + len < SIZE {
                on_a_thread_of_a_frontend(move || client.write(offset + len));
            }
        };
        let request = WriteRequest { offset: offset as u64, handle: Handle::new(0), durable: true };
        self.service.write(call(offset as u64 + 1), self.disk, request, &vec![7; len], answer);
    }
}

fn on_a_thread_of_a_frontend(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().name("frontend".into()).spawn(work);
    thread.unwrap().join().unwrap();
}

// The permit to wait was held while the answer was written: every other write was made by another thread, from a copy.
#[test]
fn no_write_of_a_client_that_waits_for_each_answer_is_handed_over() {
    let fixture = Fixture::new();
    // The first request attaches the disk, on another thread.
    assert_eq!(done(&fixture.write(BLANK, 0, b"first")), Ok(()));
    let (service, disk) = (fixture.service.clone(), fixture.disks[BLANK]);
    let client = Arc::new(Client { service, disk, threads: Mutex::default() });
    let first = client.clone();
    on_a_thread_of_a_frontend(move || first.write(0));
    assert_eq!(*client.threads.lock(), vec!["frontend"; 4]);
}
