//! Files of the spool: the state of a copy or of a hold, a [`MARK`], and a message.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use smtp_dup::message::{Message, QueueId};
use smtp_dup::relay::copy::Copy;
use smtp_dup::relay::destination::Destination;
use smtp_dup::spool::claim::{Claim, Claimed, Mail, Owed, seconds};
use smtp_dup::spool::draft::Draft;
use smtp_dup::spool::inventory::{Item, Part};
use smtp_dup::spool::{Entry, Settings, Spool};

/// Between the state and the message.
const MARK: u8 = 0xFE;

/// Whose copy it is.
const BACKUP: &str = "backup:25";

/// Reads these octets as files of the spool, and writes what could be read again.
///
/// # Panics
/// When it is not the same then, or something is lost.
pub fn run(octets: &[u8]) {
    static PLACE: Mutex<Option<Place>> = Mutex::new(None);
    let mut place = PLACE.lock().expect("no panic before");
    let place = place.get_or_insert_with(Place::make);
    let (state, mail) = match octets.iter().position(|&octet| octet == MARK) {
        Some(at) => (&octets[..at], &octets[at + 1..]),
        None => (octets, &[][..]),
    };
    let item = place.put(state, mail);
    let read = place.spool.item_mail(&item);
    let claim = place.claim_state(&item, state);
    match (place.spool.load(item.entry), read) {
        (Ok(mail), Ok(_)) => {
            write_again(&place.spool, &mail);
            place.settle(&item, mail, claim);
        }
        (Err(error), Err(_)) => {
            claim.without_mail(error);
            let damaged = fs::read_dir(place.path("damaged")).expect("the folder").count();
            assert!(damaged >= 2, "what cannot be read is kept aside");
        }
        (loaded, read) => panic!("{loaded:?} but {read:?}"),
    }
    place.clear();
}

/// A folder for the spool, in memory if it can be.
struct Place {
    _folder: tempfile::TempDir,
    root: PathBuf,
    spool: Arc<Spool>,
}

impl Place {
    fn make() -> Place {
        let memory = tempfile::tempdir_in("/dev/shm");
        let folder = memory.or_else(|_| tempfile::tempdir()).expect("a folder");
        let root = folder.path().join("spool");
        let settings = Settings {
            folder: root.clone(),
            required: false,
            retry_for: Duration::from_secs(3600),
            max_bytes: 0,
        };
        let spool = Arc::new(Spool::open(&settings).expect("a spool"));
        Place { _folder: folder, root, spool }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Puts the files in their places. Gives the copy, as it is found.
    fn put(&self, state: &[u8], mail: &[u8]) -> Item {
        let hour = self.path("queue/2026112309");
        fs::create_dir(&hour).expect("a new folder");
        fs::write(hour.join("00000000AA.mail"), mail).expect("room");
        fs::write(hour.join(format!("00000000AA.to.{BACKUP}")), state).expect("room");
        fs::write(self.path("hold").join(BACKUP), state).expect("room");
        let mut items = self.spool.items(Part::Queue).expect("the queue");
        items.next().expect("a copy").expect("its folder")
    }

    /// Takes the copy. Its state is what was read; one that cannot be read means that all is owed.
    fn claim_state(&self, item: &Item, state: &[u8]) -> Claim {
        let spool = &self.spool;
        let read = spool.state(item);
        let held = spool.held(BACKUP);
        assert!(held.is_none() || read.is_some(), "{held:?}");
        let claim = match spool.claim(item.entry, BACKUP) {
            Ok(claimed) => is_ours(claimed),
            Err(error) => {
                assert!(read.is_none() && !state.is_empty(), "{error}");
                let claim = claim(spool, item.entry);
                assert_eq!(claim.owed, Owed::default());
                claim
            }
        };
        if let Some(read) = read {
            assert_eq!(in_seconds(&read), in_seconds(&claim.owed));
        }
        claim.put_off(&claim.owed).expect("room");
        let again = spool.state(item).expect("what was written");
        assert_eq!(in_seconds(&again), in_seconds(&claim.owed));
        claim
    }

    /// The copy is for recipients that there are. They are refused, sent again by hand, and sent.
    fn settle(&self, item: &Item, mail: Mail, old: Claim) {
        drop(old);
        let spool = &self.spool;
        let (envelope, backups) = (mail.envelope.clone(), mail.backups.clone());
        let message = Arc::new(Message::from_spool(item.entry, mail));
        let copy = Copy::new(&message).claimed(claim(spool, item.entry));
        let refused: Vec<_> =
            copy.owed.iter().map(|&place| (place, "550 5.1.1 no".into())).collect();
        for (place, _) in &refused {
            copy.recipient(*place);
        }
        if refused.is_empty() || !is_written_by_us(&backups) {
            return;
        }
        let claim = copy.claim.expect("what it was given");
        claim.refused(&envelope, &refused, copy.attempts).expect("room");
        claim.delivered(&backups).expect("a copy");
        drop(claim);
        assert!(self.items(Part::Queue).is_empty());
        let failed = self.items(Part::Failed);
        let [failed] = &failed[..] else { panic!("{failed:?}") };
        let mut places: Vec<usize> = copy.owed.clone();
        places.sort_unstable();
        places.dedup();
        let state = spool.state(failed).expect("its state");
        assert_eq!(state.places.map(|all| all.len()), Some(places.len()));
        assert_eq!(spool.item_mail(failed).expect("its message").envelope, envelope);
        spool.retry(failed, None).expect("a retry");
        assert_eq!(self.items(Part::Queue).len(), 1);
        assert!(self.items(Part::Failed).is_empty());
    }

    fn items(&self, part: Part) -> Vec<Item> {
        self.spool.items(part).expect("the folder").map(|item| item.expect("a copy")).collect()
    }

    /// A sweep, which must get along with anything, and then all is removed.
    fn clear(&self) {
        self.spool.sweep(&[BACKUP.into()]).expect("a sweep");
        for folder in ["tmp", "failed", "damaged", "hold"] {
            for file in fs::read_dir(self.path(folder)).expect("the folder") {
                fs::remove_file(file.expect("a name").path()).expect("a file");
            }
        }
        for hour in fs::read_dir(self.path("queue")).expect("the folder") {
            fs::remove_dir_all(hour.expect("a name").path()).expect("an hour");
        }
    }
}

fn claim(spool: &Arc<Spool>, entry: Entry) -> Claim {
    is_ours(spool.claim(entry, BACKUP).expect("a copy"))
}

fn is_ours(claimed: Claimed) -> Claim {
    match claimed {
        Claimed::Yes(claim) => claim,
        other => panic!("{other:?}"),
    }
}

/// A state, its times as they are written.
fn in_seconds(owed: &Owed) -> (u32, Option<u64>, Option<u64>, &str, Option<&[usize]>) {
    let (next, since) = (owed.next.map(seconds), owed.since.map(seconds));
    (owed.attempts, next, since, &owed.reply, owed.places.as_deref())
}

/// The names of backups are those of destinations, each once.
fn is_written_by_us(backups: &[String]) -> bool {
    let is_one = |name: &String| name.len() < 200 && Destination::parse(name).is_ok();
    backups.iter().enumerate().all(|(n, name)| is_one(name) && !backups[..n].contains(name))
}

/// A message that could be read is the same when it has been written again.
fn write_again(spool: &Arc<Spool>, mail: &Mail) {
    if !is_written_by_us(&mail.backups) {
        return;
    }
    let backups: Arc<[String]> = mail.backups.clone().into();
    let mut draft = Draft::begin(spool, QueueId::next(), &mail.envelope, &backups).expect("room");
    draft.write(&body(mail)).expect("room");
    draft.sync().and_then(|()| draft.address()).expect("room");
    let stored = draft.commit().map_err(|(error, _)| error).expect("room");
    let again = spool.load(stored.entry).expect("what was written");
    assert_eq!(again.envelope, mail.envelope);
    assert_eq!(again.backups[..], backups[..]);
    assert_eq!(body(&again), body(mail));
    for backup in backups.iter() {
        let claim = is_ours(spool.claim(stored.entry, backup).expect("a copy"));
        assert_eq!(claim.owed, Owed::default());
        claim.delivered(&backups).expect("a copy");
    }
    if backups.is_empty() {
        spool.sweep(&[]).expect("a sweep");
    }
}

fn body(mail: &Mail) -> Vec<u8> {
    let mut body = vec![0; mail.length as usize];
    mail.file.read_exact_at(&mut body, mail.start).expect("its length");
    body
}
