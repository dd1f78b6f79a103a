#![no_main]

libfuzzer_sys::fuzz_target!(|octets: &[u8]| smtp_dup_fuzz::session::run(octets));
